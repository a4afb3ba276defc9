"""Codebooks larger than memory: built from a stream, mapped when they are opened."""

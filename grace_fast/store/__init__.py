"""Codebooks on disk."""

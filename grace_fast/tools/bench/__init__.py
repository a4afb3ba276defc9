"""Benchmarks that run on a user's machine: `grace-fast bench`."""

"""Triton kernels of grace_fast, one file per kernel; import them by module, this file stays empty."""

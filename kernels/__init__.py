"""Triton kernels, one file each, imported by module. This file stays empty."""

"""Faults of disks and processes: what a codebook's directory is after each of them."""

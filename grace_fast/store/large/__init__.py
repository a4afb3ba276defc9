"""Codebooks larger than memory: built from a stream, mapped when they are opened."""

from grace_fast.codebook.codebook import Codebook, Directories
from grace_fast.store.large import resident, stream

Codebook.directories = Directories(resident.open, resident.save, stream.build)

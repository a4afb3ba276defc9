"""The life of edits on a codebook, without a model."""

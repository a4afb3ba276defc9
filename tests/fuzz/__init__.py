"""Whatever reads a file that somebody else may have written, given files that were changed."""

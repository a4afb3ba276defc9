"""Rows in memory: keys, values, radii and labels, one writer, any number of readers."""

"""The index: quantized keys, sorted and kept up to date beside edits, that prove most misses."""

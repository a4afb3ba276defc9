"""What proves a miss without reading keys: quantized keys, sorted, kept up to date beside edits."""

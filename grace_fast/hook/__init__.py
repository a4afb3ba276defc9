"""The edited layer: which token asks, what was found, how it is written into the output."""

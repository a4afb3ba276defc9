"""Look-ups: find, nearest and replace, and the back ends that carry them out."""

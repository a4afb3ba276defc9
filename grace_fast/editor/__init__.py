"""GRACE on a model: attach to one layer, edit, explain, undo, verify, save."""

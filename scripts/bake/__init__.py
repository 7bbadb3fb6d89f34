"""Bakes images and looks after them: what `scripts/bake.py` does, from the tree to a verified, promoted snapshot."""

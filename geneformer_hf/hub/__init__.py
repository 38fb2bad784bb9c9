"""Checkpoints as others publish them, and ours as others read them."""

"""Cells in: readers, gene medians, the Arrow dataset builder and collators."""

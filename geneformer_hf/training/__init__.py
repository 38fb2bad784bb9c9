"""Pretraining and, on top of it, continual learning."""

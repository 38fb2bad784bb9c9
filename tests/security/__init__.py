"""Hostile inputs, one for each row of docs/security.md: refused by name, before anything in them is opened or run."""

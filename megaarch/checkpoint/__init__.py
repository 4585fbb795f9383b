"""Checkpoints of a run: files that are whole or absent, read again in any layout."""

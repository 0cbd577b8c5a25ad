"""Sharing checkpoints."""

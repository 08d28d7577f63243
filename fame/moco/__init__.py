"""Momentum contrast for two clips of a video."""

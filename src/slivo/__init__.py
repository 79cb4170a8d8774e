"""Prune, then distil: make a trained network smaller and faster, and keep its accuracy."""

__version__ = "0.1.0"

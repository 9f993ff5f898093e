"""Directions of descent, computed from gradients: one file for each, and their protocol."""

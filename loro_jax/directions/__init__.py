"""Turning gradients into directions of descent: one file each, and the protocol they share."""

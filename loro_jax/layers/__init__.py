"""Projections for anyone's model, one kind a file."""

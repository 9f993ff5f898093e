"""Projections for anyone's model, one kind in each file."""

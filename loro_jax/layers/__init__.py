"""Projections for use in any model, one kind per file."""

"""Comparisons of methods on equal terms, their reports and their results."""

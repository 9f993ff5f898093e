"""Comparisons of methods under equal conditions, with reports and results."""

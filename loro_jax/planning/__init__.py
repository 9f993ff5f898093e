"""Estimates of a run's memory, time and communication, from compiled programs alone."""

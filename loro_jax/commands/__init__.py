"""The commands of ``python -m loro_jax NAME``."""

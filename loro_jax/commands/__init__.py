"""The programs behind ``python -m loro_jax NAME``."""

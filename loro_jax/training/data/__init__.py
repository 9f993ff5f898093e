"""``python -m loro_jax.training.data``, another name of two commands."""

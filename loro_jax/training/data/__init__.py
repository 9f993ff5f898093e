"""``python -m loro_jax.training.data prepare`` of earlier versions; see :mod:`loro_jax.text`."""

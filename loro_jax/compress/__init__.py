"""Low-rank pairs from the dense projections of a trained LLaMA.

methods.py is the table of methods: each is a rule for the ranks (ranks.py) and a rule for the pairs
at a given rank (svd.py, asvd.py, lord.py). calibration.py measures the projections' inputs on a
text, and compression.py applies a method to a model.
"""

from loro_jax.compress.compression import Compressed, CompressedMatrix, compress
from loro_jax.compress.methods import METHODS

__all__ = ["METHODS", "Compressed", "CompressedMatrix", "compress"]

"""A look inside a model: spectra of its matrices, and the straight line between two models."""

from loro_jax.inspection.matrices import Matrix, matrices_of, small_tables

__all__ = ["Matrix", "matrices_of", "small_tables"]

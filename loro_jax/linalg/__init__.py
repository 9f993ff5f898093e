"""Linear algebra of matrices, independent of pairs: batching, precision, factorisations."""

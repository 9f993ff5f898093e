"""Linear algebra that knows nothing of pairs: batching, precision, factorisations by products."""

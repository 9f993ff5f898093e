"""The same work by PyTorch and Hugging Face's transformers, in turns with ours.

PyTorch runs in a process of its own (:mod:`loro_jax.bench.counterpart.torch_side`), which waits for
a line before each call. In one process the idle threads of OpenMP and of XLA, which spin for a
while before they sleep, would take the cores that the other library needs, and memory that one has
freed would make the other's allocations cheaper. Calls alternate (ours, theirs, ours, ...) with a
pause in between, so that a machine that is busy for a while slows down both. Both sides have the
same weights, tokens and number of threads.
"""

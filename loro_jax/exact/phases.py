"""The default exact step of several batches, which shares its r x r part between all shapes.

The products over the long axes differ from shape to shape; what is done with their r x r results
does not. So each shape compiles a few products, and the factorisations, which take a compiler much
longer, are compiled once per rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.exact.basis import by_products, by_singular_vectors
from loro_jax.exact.step import Batch, ExactStep
from loro_jax.exact.subspace import Combination, Grams, combination, grams, new_factors, new_space
from loro_jax.linalg.batching import varying_alike, zeros_beside

Array = jax.Array

# In chunks only: upper bound on the coefficients held at once, 13 r x r matrices for each pair; the
# chunks are below it. 128 MiB in float32, which are 9 pairs of rank 512.
COEFFICIENTS = 2**25
_PER_PAIR = 13

_DoPair = Callable[[int, Any, Any], Any]


def graph_steps(batches: Sequence[Batch], basis: str) -> list[ExactStep]:
    """Takes the default exact step of batches of one rank and dtype.

    Returns:
        The new factors of each batch, or the old ones where ``ok`` is false: these pairs need
        another method.
    """
    # On CPU LAPACK calls must not be batched (see one_by_one). A GPU needs the parallelism of a
    # batch. A TPU is busy with one large product, and its compiler takes seven times as long for
    # those of a batch in full precision (60M, all shapes: 150 s against 22).
    in_chunks = functools.partial(_in_chunks, basis=basis)
    return jax.lax.platform_dependent(
        list(batches),
        cpu=in_chunks,
        tpu=in_chunks,
        default=functools.partial(_all_at_once, basis=basis),
    )


def _all_at_once(batches: Sequence[Batch], basis: str) -> list[ExactStep]:
    """Steps all pairs together."""
    # Rotating to the nearest basis can start from any balanced basis, so the cheaper one is used.
    balance_of = by_products if basis == "nearest" else by_singular_vectors

    def small(of: Grams, size: Any) -> Combination:
        space = new_space(of, size)
        return combination(space, balance_of(space.squares), basis)

    found = [jax.vmap(grams)(*batch[:4]) for batch in batches]
    every = jax.vmap(small)(_joined(found), _joined([batch.size for batch in batches]))
    return [
        jax.vmap(new_factors)(*batch[:4], jax.tree.map(lambda x, a=a, z=z: x[a:z], every))
        for batch, (a, z) in zip(batches, itertools.pairwise(starts_of(batches)), strict=True)
    ]


def _in_chunks(batches: Sequence[Batch], basis: str) -> list[ExactStep]:
    """Steps pairs in chunks, with all eigendecompositions of a chunk in one phase.

    After an eigendecomposition the threads of OpenBLAS keep spinning for a while, on the cores that
    matrix products need. In phases this happens once per chunk instead of once per pair. A chunk
    can begin in one batch and end in another.
    """
    starts = starts_of(batches)
    sizes = _joined([batch.size for batch in batches])
    # The fewest chunks within the memory bound, as equal as possible.
    most = max(1, COEFFICIENTS // (_PER_PAIR * batches[0].A.shape[-2] ** 2))
    chunks = -(-starts[-1] // most)
    at_a_time = -(-starts[-1] // chunks)

    # The last chunk may be shorter: its slice must not be shifted back over its predecessor's.
    missing = chunks * at_a_time - starts[-1]
    padded_sizes = jax.tree.map(lambda x: jnp.pad(x, (0, missing)), sizes)

    def step(chunk: Any, new: list[ExactStep]) -> list[ExactStep]:
        first = chunk * at_a_time
        count = jnp.minimum(at_a_time, starts[-1] - first)

        def each_pair(do: _DoPair, carry: Any) -> Any:
            """Applies ``do(batch, place in it, carry)`` to the chunk's pairs, batch by batch."""
            for which, (start, end) in enumerate(itertools.pairwise(starts)):
                low, high = (
                    jnp.clip(x - start, 0, end - start) for x in (first, first + at_a_time)
                )
                carry = jax.lax.fori_loop(
                    low, high, lambda i, carry, which=which: do(which, i, carry), carry
                )
            return carry

        # Factors are read from the results, where those of this chunk are still the old ones.
        def pair(which: int, i: Any, new: Sequence[ExactStep]) -> tuple[Array, Array, Array, Array]:
            of = batches[which]
            return new[which].B[i], new[which].A[i], of.dB[i], of.dA[i]

        def find(which: int, i: Any, found: Grams) -> Grams:
            return _with_entry(found, starts[which] + i - first, grams(*pair(which, i, new)))

        found = each_pair(find, _room(at_a_time, grams, *pair(0, 0, new)))

        def entry(tree: Any, i: Any) -> Any:
            return jax.tree.map(lambda x: x[i], tree)

        def mapped(function: Callable, *trees: Any) -> Any:
            room = _room(at_a_time, function, *(entry(tree, 0) for tree in trees))
            return jax.lax.fori_loop(
                0,
                count,
                lambda i, done: _with_entry(done, i, function(*(entry(tree, i) for tree in trees))),
                room,
            )

        of_chunk = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, at_a_time), padded_sizes
        )
        spaces = mapped(new_space, found, of_chunk)
        balances = mapped(by_singular_vectors, spaces.squares)
        every = mapped(lambda space, balance: combination(space, balance, basis), spaces, balances)

        def write(which: int, i: Any, new: list[ExactStep]) -> list[ExactStep]:
            by = entry(every, starts[which] + i - first)
            done = _with_entry(new[which], i, new_factors(*pair(which, i, new), by))
            return [*new[:which], done, *new[which + 1 :]]

        return each_pair(write, new)

    unwritten = [ExactStep(b.B, b.A, jnp.zeros_like(b.size.rate, dtype=bool)) for b in batches]
    return jax.lax.fori_loop(0, chunks, step, varying_alike(unwritten))


def starts_of(batches: Sequence[Batch]) -> list[int]:
    """Returns where each batch begins in their concatenation, and where the last one ends."""
    return [0, *itertools.accumulate(len(batch.B) for batch in batches)]


def _joined(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)


def _room(count: int, function: Callable, *arguments: Any) -> Any:
    """Returns zeros for the results of ``count`` calls of a function."""
    one = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: zeros_beside(arguments, (count, *x.shape), x.dtype), one)


def _with_entry(tree: Any, i: Any, one: Any) -> Any:
    return jax.tree.map(lambda every, x: every.at[i].set(x), tree, one)

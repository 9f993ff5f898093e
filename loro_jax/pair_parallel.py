"""Maps a function over all pairs of a tree: batched by shape, divided among a mesh's devices.

An exact step needs each pair whole, and all pairs of a shape cost the same; so each device takes
some of the pairs. Factors may have any sharding. Those of one shape are processed as follows:

1. each factor is resharded along its long axis over all devices (from any sharding this is a
   slice or an all-to-all), and the factors are stacked;
2. one all-to-all turns "a slice of every pair" into "some whole pairs" on each device;
3. each device steps its pairs;
4. one all-to-all turns them into slices again, and each factor is resharded to its original
   sharding.

In between, no device holds more than its share of the pairs. Factors are gathered only leaf by
leaf, and only in these cases: at the end, if they are replicated over some axis of the mesh, or
(with automatic axes, where XLA chooses the collectives) sharded such that XLA finds nothing
shorter; in 1, if the number of devices divides neither axis of the shape. If the number of devices
does not divide the number of pairs, trivial pairs are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from loro_jax.linalg.batching import count_of_none
from loro_jax.pairs import Pairs

Array = jax.Array

# (B and arrays of its shape), (A and arrays of its shape).
PairArrays = tuple[tuple[Array, ...], tuple[Array, ...]]
# The shardings of B and A of a pair.
Shardings = tuple[NamedSharding, NamedSharding]
# Takes batches of several shapes; returns as many, and a count.
BatchesStep = Callable[[list[PairArrays]], tuple[list[PairArrays], Array]]


def map_pairs(
    step: BatchesStep,
    pairs: Sequence[PairArrays],
    mesh: Any | None = None,
    shardings: Sequence[Shardings | None] | None = None,
) -> tuple[list[PairArrays], Array]:
    """Applies a function of batches of pairs to many pairs, those of one shape in a batch.

    A model has few shapes and many pairs: batching keeps the program small, and a GPU busy although
    each matrix is small.

    Args:
        step: takes a batch for each shape: arrays (N, m, r) for the output side and (N, r, n) for
            the input side. Returns two tuples of such arrays for each batch, and a count (int32
            scalar).
        pairs: for each pair, arrays (..., m, r) and (..., r, n), the same number of each for all.
        mesh: the devices to divide the work among; None: the mesh in the arrays' types, or that of
            ``jax.set_mesh``; without one the work is not divided.
        shardings: of the output and the input side of each pair; results are returned with the
            same shardings. With automatic axes nothing else fixes them, and XLA may shard the
            surrounding program to suit this work. None, for all pairs or one: as in the arrays'
            types, or as XLA decides.

    Returns:
        The function's results for each pair, with the leading axes of the pair, and the sum of the
        counts.

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = jnp.ones((4, 2)), jnp.ones((3, 2, 5))
        >>> pairs = [((B,), (A[0],)), ((jnp.stack([B, B]),), (A[1:],))]
        >>> def double(batches):
        ...     count = sum(len(outs[0]) for outs, _ in batches)
        ...     return [((2 * outs[0],), ins) for outs, ins in batches], jnp.int32(count)
        >>> results, count = map_pairs(double, pairs)
        >>> [result[0][0].shape for result in results], int(count)
        ([(4, 2), (2, 4, 2)], 3)
    """
    # One division for all batches: arrays of a tree share their mesh.
    division = _division([array for pair in pairs for side in pair for array in side], mesh)
    groups: dict[Any, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(_shapes(pair), []).append(i)
    arrays = [[pairs[i] for i in members] for members in groups.values()]
    if not groups:
        return [], count_of_none(pairs)
    if division is None:
        outcomes, count = _run_here(step, arrays)
    else:
        specs = [
            [_specs(pairs[i], shardings[i] if shardings else None, division.explicit) for i in one]
            for one in groups.values()
        ]
        outcomes, count = division.run(step, arrays, specs)
    # Back in the order of the pairs, which the grouping by shape has changed.
    results = {
        i: result
        for members, found in zip(groups.values(), outcomes, strict=True)
        for i, result in zip(members, found, strict=True)
    }
    return [results[i] for i in range(len(pairs))], count


# Specs of the output and of the input side of a pair; None: unknown.
_Specs = tuple[PartitionSpec, PartitionSpec] | None


def _specs(pair: PairArrays, shardings: Shardings | None, explicit: bool) -> _Specs:
    """Returns the specs of a pair's sides, given by the user or by explicit types."""
    if shardings is not None:
        return shardings[0].spec, shardings[1].spec
    if not explicit:
        return None
    (out, *_), (inp, *_) = pair
    return jax.typeof(out).sharding.spec, jax.typeof(inp).sharding.spec


def _shapes(pair: PairArrays) -> Any:
    """Returns the key of the batch that a pair belongs to: shapes and dtypes of all its arrays."""
    return tuple(tuple((x.shape[-2:], x.dtype) for x in side) for side in pair)


def _run_here(
    step: BatchesStep, groups: Sequence[Sequence[PairArrays]]
) -> tuple[list[list[PairArrays]], Array]:
    done, count = step([_stacked([_flat(pair) for pair in pairs]) for pairs in groups])
    return [_unstack(one, pairs) for one, pairs in zip(done, groups, strict=True)], count


def _stacked(flat: Sequence[PairArrays]) -> PairArrays:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *flat)


def _flat(pair: PairArrays) -> PairArrays:
    """Merges the leading axes into one, of length one if there is none."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), pair)


def _unstack(stacked: PairArrays, pairs: Sequence[PairArrays]) -> list[PairArrays]:
    # Padding at the end of a batch, if any, is dropped here: no pair covers it.
    results, start = [], 0
    for outs, _ in pairs:
        batch = outs[0].shape[:-2]
        stop = start + math.prod(batch)
        results.append(
            jax.tree.map(
                lambda x, a=start, z=stop, batch=batch: x[a:z].reshape(*batch, *x.shape[1:]),
                stacked,
            )
        )
        start = stop
    return results


def shardings_on_mesh(
    mesh: Any, params: Any, pairs: Pairs
) -> tuple[Any, list[Shardings | None] | None]:
    """Interprets the argument ``mesh``: returns its mesh, and the shardings of each pair on it.

    Args:
        mesh: None, a mesh, or a tree like the parameters or a prefix of it. Its leaves are
            shardings, PartitionSpecs of the mesh of ``jax.set_mesh``, or None if unknown. Shardings
            without a mesh, such as that of an array on one device, are ignored.
        params: the parameters.
        pairs: the pairs of the parameters.

    Returns:
        The mesh, or None to detect it automatically; and shardings or None for each pair, or a
        single None if the argument gives no shardings.

    Raises:
        ValueError: if the tree does not fit, if its shardings are on different meshes, or if there
            is no mesh for a PartitionSpec.
    """
    if mesh is None or isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        return mesh, None
    of_pairs, _ = pairs.choose(_sharding_of_each_leaf(mesh, params))
    factors = [sharding for both in of_pairs for sharding in both]
    meshes = [x.mesh for x in factors if isinstance(x, NamedSharding)]
    if not meshes and any(isinstance(x, PartitionSpec) for x in factors):
        meshes = [jax.sharding.get_abstract_mesh()]
        if meshes[0].empty:
            raise ValueError(
                "loro: mesh holds PartitionSpecs, but no mesh is set that they are of; pass "
                "NamedShardings, or take steps inside jax.set_mesh(mesh)."
            )
    # No sharding has a mesh. An empty mesh, unlike None, keeps map_pairs from looking for one.
    if not meshes:
        return jax.sharding.AbstractMesh((), ()), None
    if any(other.abstract_mesh != meshes[0].abstract_mesh for other in meshes):
        raise ValueError(
            f"loro: mesh holds shardings of different meshes, {sorted({str(m) for m in meshes})}; "
            "expected one mesh for all pairs."
        )

    def on_mesh(found: Any) -> NamedSharding | None:
        if isinstance(found, PartitionSpec):
            return NamedSharding(meshes[0], found)
        return found if isinstance(found, NamedSharding) else None

    shardings: list[Shardings | None] = []
    for B, A in of_pairs:
        of_B, of_A = on_mesh(B), on_mesh(A)
        shardings.append((of_B, of_A) if of_B is not None and of_A is not None else None)
    return meshes[0], shardings


def _sharding_of_each_leaf(tree: Any, params: Any) -> list[Any]:
    """Broadcasts a tree of shardings, or a prefix of it, to all leaves of the parameters."""

    def is_sharding(x: Any) -> bool:
        return x is None or isinstance(x, jax.sharding.Sharding | PartitionSpec)

    found = jax.tree.leaves(tree, is_leaf=is_sharding)
    found = [x.sharding if isinstance(x, jax.Array) else x for x in found]
    wrong = [x for x in found if not is_sharding(x)]
    if wrong:
        raise ValueError(
            "loro: mesh must be a mesh, or a tree of shardings like the parameters, but holds a "
            f"{type(wrong[0]).__name__}."
        )
    # Counted rather than compared as trees: None is a leaf here, but not in the parameters.
    expected = len(jax.tree.leaves(params))
    if len(found) == expected:
        return found
    try:
        each = jax.tree.map(
            lambda sharding, part: [sharding] * len(jax.tree.leaves(part)),
            tree,
            params,
            is_leaf=is_sharding,
        )
        return jax.tree.leaves(each, is_leaf=is_sharding)
    except (ValueError, TypeError):
        raise ValueError(
            f"loro: mesh must be a mesh, or a tree of {expected} shardings like the parameters (or "
            f"a prefix of it), but has {len(found)} leaves."
        ) from None


# ------------------------------------------------------------------------------ over devices


def _division(arrays: Sequence[Array], mesh: Any | None) -> _Division | None:
    """Returns how to divide work on these arrays, or None for a single device or no mesh."""
    if mesh is None:
        meshes = [jax.typeof(x).sharding.mesh for x in arrays]
        named = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
        mesh = named[0] if named else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    explicit = AxisType.Explicit in kinds.values()
    kind = AxisType.Explicit if explicit else AxisType.Auto
    # Parameters are usually split over the last axes of a mesh. With these first, an array split
    # over them and replicated over the others is almost in place already.
    axes = tuple(name for name in reversed(mesh.axis_names) if kinds[name] == kind)
    # Axes that a surrounding vmap maps over already divide the work.
    if explicit:
        axes = tuple(name for name in axes if not _mapped_over(name, mesh))
    division = _Division(mesh, axes, explicit)
    return division if division.ways > 1 else None


def _mapped_over(axis: str, mesh: Any) -> bool:
    """Returns whether a ``jax.vmap`` around this code maps over an axis of an explicit mesh.

    It does if the mapped axis of an array is sharded over it, as in an ensemble with some members
    on each device. The mesh still has the axis then, but no array inside may be sharded over it.
    JAX has no public query for this, so this function tries to shard.
    """
    try:
        jax.eval_shape(
            jax.shard_map(
                lambda: jnp.zeros([]),
                mesh=mesh,
                in_specs=(),
                out_specs=PartitionSpec(),
                axis_names={axis},
            )
        )
    except ValueError:
        return True
    return False


class _Division(NamedTuple):
    """The axes of a mesh over which work is divided."""

    mesh: Any
    axes: tuple[str, ...]
    explicit: bool

    @property
    def ways(self) -> int:
        """Number of shares."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    def reshard(self, x: Array, spec: PartitionSpec) -> Array:
        """Returns the array with another sharding."""
        sharding = NamedSharding(self.mesh, spec)
        if self.explicit:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def slices(self, x: Array, long_axis: int) -> Array:
        """Reshards over all devices along the long axis, or the other if it doesn't divide."""
        spec: list[Any] = [None] * x.ndim
        # -3 - axis swaps the last two axes: -1 and -2.
        for axis in (long_axis, -3 - long_axis):
            if x.shape[axis] % self.ways == 0:
                spec[axis] = self.axes
                break
        return self.reshard(x, PartitionSpec(*spec))

    def sliced(self, pair: PairArrays) -> PairArrays:
        """Reshards output sides (..., m, r) along m, and input sides (..., r, n) along n."""
        outs, ins = pair
        return tuple(self.slices(x, -2) for x in outs), tuple(self.slices(x, -1) for x in ins)

    def whole(self, x: Array, long_axis: int, spec: PartitionSpec) -> Array:
        """Reshards slices to a spec.

        If the spec leaves axes of the mesh unused, slices are first replicated along these: in a
        single step XLA would gather the whole array.
        """
        used = jax.tree.leaves(tuple(spec))
        fewer = self._replace(axes=tuple(axis for axis in self.axes if axis in used))
        if 0 < len(fewer.axes) < len(self.axes):
            x = fewer.slices(x, long_axis)
        return self.reshard(x, spec)

    def run(
        self,
        step: BatchesStep,
        groups: Sequence[Sequence[PairArrays]],
        specs: Sequence[Sequence[_Specs]],
    ) -> tuple[list[list[PairArrays]], Array]:
        """Does the same as :func:`_run_here` on all devices together."""

        def work(shares: list[PairArrays]) -> tuple[list[PairArrays], Array]:
            done, count = step(shares)
            # Each device has counted its own pairs only.
            return done, jax.lax.psum(count, self.axes)

        divided = jax.shard_map(
            work,
            mesh=self.mesh,
            in_specs=PartitionSpec(self.axes),
            out_specs=(PartitionSpec(self.axes), PartitionSpec()),
            axis_names=set(self.axes),
            check_vma=False,
        )
        done, count = divided([self.shares(*group) for group in zip(groups, specs, strict=True)])
        results = [
            [
                self.in_original(result, spec)
                for result, spec in zip(_unstack(self.sliced(one), pairs), of_pairs, strict=True)
            ]
            for one, pairs, of_pairs in zip(done, groups, specs, strict=True)
        ]
        return results, count

    def shares(self, pairs: Sequence[PairArrays], specs: Sequence[_Specs]) -> PairArrays:
        """Stacks pairs of one shape and gives each device some of them."""
        # With automatic axes, constraining inputs and outputs keeps the choice of shardings in here
        # from spreading into the surrounding program.
        if not self.explicit:
            pairs = [self.pinned(pair, spec) for pair, spec in zip(pairs, specs, strict=True)]
        # Slices are stacked before the all-to-all, so that a batch needs one for all its pairs.
        stacked = _stacked([_flat(self.sliced(pair)) for pair in pairs])
        missing = -len(stacked[0][0]) % self.ways

        def share(x: Array) -> Array:
            # Padding by identities: well-conditioned, so that they cause no fallbacks.
            trivial = jnp.broadcast_to(
                jnp.eye(x.shape[1], x.shape[2], dtype=x.dtype), (missing, *x.shape[1:])
            )
            if self.explicit:
                trivial = jax.sharding.reshard(trivial, jax.typeof(x).sharding)
            return self.reshard(jnp.concatenate([x, trivial]), PartitionSpec(self.axes))

        shares: PairArrays = jax.tree.map(share, stacked)
        return shares

    def pinned(self, pair: PairArrays, specs: _Specs) -> PairArrays:
        """Constrains the arrays of a pair to their present sharding."""
        if specs is None:
            return pair
        outs, ins = pair
        return tuple(self.reshard(x, specs[0]) for x in outs), tuple(
            self.reshard(x, specs[1]) for x in ins
        )

    def in_original(self, pair: PairArrays, specs: _Specs) -> PairArrays:
        """Reshards the slices of a pair to its original sharding."""
        if specs is None:
            return pair
        outs, ins = pair
        return (
            tuple(self.whole(x, -2, specs[0]) for x in outs),
            tuple(self.whole(x, -1, specs[1]) for x in ins),
        )

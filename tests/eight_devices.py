"""Runs the optimizer on eight simulated devices and prints what it saw, one JSON object a layout.

A program of its own, because the number of devices is fixed when JAX starts. Usage:
``python -m tests.eight_devices explicit|auto``.
"""

import json
import re
import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from loro_jax import LowRank, exact_update, loro, riemannian_descent

M, N, R, LAYERS = 64, 40, 16, 8
P = PartitionSpec


def tree(seed, std=1.0):
    """Three pairs, one of them the layers of a scanned model, and a regular leaf."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return (std * rng.normal(size=shape)).astype(np.float32)

    return {
        "one": LowRank(normal(M, R), normal(R, N)),
        "two": LowRank(normal(M, R), normal(R, N)),
        "layers": LowRank(normal(LAYERS, M, R), normal(LAYERS, R, N)),
        "bias": normal(8),
    }


def layouts(x):
    """Specs of B and A by name, for single pairs and for scanned ones, over the axes x."""
    rows = (P(x, None), P(None, x)), (P(None, x, None), P(None, None, x))
    rank = (P(None, x), P(x, None)), (P(None, None, x), P(None, x, None))
    columns = (P(None, x), P(None, x)), (P(None, None, x), P(None, None, x))
    copies = (P(), P()), (P(), P())
    return {
        "replicated": [*copies, copies[0]],
        "rows": [*rows, rows[0]],
        "columns": [*columns, columns[0]],
        "rank": [*rank, rank[0]],
        "layers": [copies[0], (P(x), P(x)), copies[0]],
        "mixed": [rows[0], (P(None, x, None), P()), rank[0]],
    }


def shardings(mesh, layout):
    one, scanned, two = ([NamedSharding(mesh, spec) for spec in specs] for specs in layout)
    return {
        "one": LowRank.tree_unflatten(None, one),
        "two": LowRank.tree_unflatten(None, two),
        "layers": LowRank.tree_unflatten(None, scanned),
        "bias": NamedSharding(mesh, P()),
    }


def two_steps(tx, params, state, grads, go):
    """An approximate step and an exact one, each in a branch.

    With explicit axes both branches must agree in the shardings of the whole state.
    """
    for _ in range(2):
        updates, state = jax.lax.cond(
            go,
            lambda state, params: tx.update(grads, state, params),
            lambda state, params: (params, state),
            *(state, params),
        )
        params = optax.apply_updates(params, updates)
    return params, state


def products(params):
    pairs = (jax.device_get(params[name]) for name in ("one", "two", "layers"))
    return [np.asarray(pair.B) @ np.asarray(pair.A) for pair in pairs]


def sizes_of(operation, hlo):
    """Elements in each result of a collective operation."""
    found = re.findall(rf"= \w+\[([\d,]*)\]\S* {operation}\(", hlo)
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found]


def examine(mesh, layout, reference, method):
    where = shardings(mesh, layout)
    params, grads = jax.device_put(tree(0), where), jax.device_put(tree(1, 0.1), where)
    explicit = AxisType.Explicit in mesh.axis_types
    tx = loro(0.01, exact_every=2, exact_method=method, mesh=None if explicit else mesh)
    state = tx.init(params)
    copied = NamedSharding(mesh, P())
    lies = jax.tree.map(lambda x: x.sharding if x.ndim else copied, state)
    kept = {} if explicit else {"out_shardings": (where, lies)}
    steps = jax.jit(lambda *arguments: two_steps(tx, *arguments), **kept)
    compiled = steps.lower(params, state, grads, True).compile()
    moved, moved_state = compiled(params, state, grads, True)
    hlo = compiled.as_text()
    moments = [state.factors.mu, state.factors.nu, moved_state.factors.mu, moved_state.factors.nu]
    factors = [leaf for pair in pairs_of(moved) for leaf in jax.tree.leaves(pair)]
    return {
        "error": max(
            float(np.max(np.abs(one - other)) / np.max(np.abs(other)))
            for one, other in zip(products(moved), reference, strict=True)
        ),
        "largest_gather": max(sizes_of("all-gather", hlo), default=0),
        "full_size": len(re.findall(rf"\[(\d+,)*{M},{N}\]", hlo)),
        "state_lies_as_the_factors": all(
            leaf.sharding.is_equivalent_to(factor.sharding, leaf.ndim)
            for side in moments
            for leaf, factor in zip(jax.tree.leaves(side), factors, strict=True)
        ),
        "factors_lie_as_before": all(
            new.sharding.is_equivalent_to(old.sharding, new.ndim)
            for new, old in zip(jax.tree.leaves(moved), jax.tree.leaves(params), strict=True)
        ),
    }


def factored(mesh, layout):
    """First entries of the B of each exact step that any device takes."""
    seen = []

    def counting(B, A, dB, dA, rate, step):
        jax.debug.callback(lambda first: seen.extend(first.tolist()), B[:, 0, 0])
        return exact_update(B, A, dB, dA, rate, method="svd")

    where = shardings(mesh, layout)
    params, grads = jax.device_put(tree(0), where), jax.device_put(tree(1), where)
    explicit = AxisType.Explicit in mesh.axis_types
    tx = riemannian_descent(
        0.01, optax.identity(), counting, exact_every=1, mesh=None if explicit else mesh
    )
    jax.block_until_ready(jax.jit(tx.update)(grads, tx.init(params), params))
    jax.effects_barrier()
    of_pairs = np.concatenate([pair.B.reshape(-1, M, R)[:, 0, 0] for pair in pairs_of(tree(0))])
    return {
        "pairs": len(of_pairs),
        "factored": [int(np.sum(np.isclose(seen, first))) for first in of_pairs],
        "in_all": len(seen),
    }


def pairs_of(params):
    """Those of the tree in the order of its leaves."""
    return [params[name] for name in sorted(params) if name != "bias"]


def main(kind):
    types = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
    params, grads = jax.device_put((tree(0), tree(1, 0.1)), jax.devices()[0])
    tx = loro(0.01, exact_every=2)
    steps = jax.jit(lambda *arguments: two_steps(tx, *arguments))
    reference = products(steps(params, tx.init(params), grads, True)[0])
    line = jax.make_mesh((8,), ("x",), axis_types=(types[kind],))
    square = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(types[kind],) * 2)
    for mesh, axes, name in ((line, "x", "line"), (square, "fsdp", "square")):
        for layout, specs in layouts(axes).items():
            if mesh is square and layout not in ("rows", "columns", "mixed"):
                continue  # what is split over one of two axes is copied over the other
            method = "graph" if mesh is line and layout == "rows" else "svd"
            row = {"mesh": name, "layout": layout}
            row |= examine(mesh, specs, reference, method)
            if layout == "mixed":
                row |= factored(mesh, specs)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    main(sys.argv[1])

"""Time of the exact step: ours, our reference, and the paper's Algorithm 2 in JAX and PyTorch.

The pairs are those of whole LLaMA layers: four in attention, three in the MLP. "nearest" is the
default method with the basis of nearest balanced factors. The two transcriptions follow the
algorithm as the authors wrote it: QR of the factors, QR of the gradients' new directions, and the
SVD of the 2r x 2r core, in float32, one pair after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.bench.options import make_parser, parse_options
from loro_jax.exact import METHODS
from loro_jax.exact.update import exact_update
from loro_jax.planning.timing import time_in_turns
from loro_jax.tables import report
from models.llama import PRESETS, preset

# Names of the presets with low-rank projections.
MODELS = [name for name, config in PRESETS.items() if config.scope == "all"]
RATE = 0.01

# Longer than the threads of OpenBLAS and PyTorch spin before they sleep. While they spin, the next
# candidate is slower, by up to 1.7 times.
_PAUSE = 0.3

Pair = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def layer_shapes(model: str) -> list[tuple[int, int, int]]:
    """Returns (m, n, r) of a layer's seven projections."""
    config = preset(model)
    shapes = [*config.shapes("attn").values(), *config.shapes("mlp").values()]
    return [(*shape, config.rank) for shape in shapes]


def make_pairs(shapes: Sequence[tuple[int, int, int]], seed: int = 0) -> list[Pair]:
    """Draws Xavier factors and directions of the size of Adam's, float32."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int, std: float) -> np.ndarray:
        return (std * rng.standard_normal((rows, columns))).astype(np.float32)

    return [
        (
            normal(m, r, (2 / (m + r)) ** 0.5),
            normal(r, n, (2 / (n + r)) ** 0.5),
            normal(m, r, 0.3),
            normal(r, n, 0.3),
        )
        for m, n, r in shapes
    ]


def naive_jax(B: jax.Array, A: jax.Array, dB: jax.Array, dA: jax.Array) -> tuple[Any, Any]:
    """Takes the exact step by Algorithm 2 as printed, with its misprints corrected."""
    r = B.shape[1]
    Q_B, R_B = jnp.linalg.qr(B)
    Q_A, R_A = jnp.linalg.qr(A.T)
    left = jnp.linalg.solve(R_B.T, dA)
    right = jnp.linalg.solve(R_A.T, dB.T).T
    # W + dW in the bases [Q_B, Q_out] and [Q_A, Q_in] is the 2r x 2r core below; its corner is
    # zero, because a tangent vector has no part that leaves both spaces.
    core = left @ Q_A
    Q_out, R_out = jnp.linalg.qr(right - Q_B @ (Q_B.T @ right))
    Q_in, R_in = jnp.linalg.qr((left - core @ Q_A.T).T)
    S = R_B @ R_A.T - RATE * core
    U, s, Vt = jnp.linalg.svd(jnp.block([[S, -RATE * R_in.T], [-RATE * R_out, jnp.zeros_like(S)]]))
    root = jnp.sqrt(s[:r])
    B_new = jnp.concatenate([Q_B, Q_out], axis=1) @ U[:, :r] * root
    return B_new, root[:, None] * (Vt[:r] @ jnp.concatenate([Q_A, Q_in], axis=1).T)


def _torch_candidate(pairs: list[Pair]) -> Callable[[], Any] | None:
    """Returns the same transcription in PyTorch; None if it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [tuple(torch.from_numpy(x).to(device) for x in pair) for pair in pairs]

    def one_pair(B: Any, A: Any, dB: Any, dA: Any) -> tuple[Any, Any]:
        r = B.shape[1]
        Q_B, R_B = torch.linalg.qr(B)
        Q_A, R_A = torch.linalg.qr(A.T)
        left = torch.linalg.solve(R_B.T, dA)
        right = torch.linalg.solve(R_A.T, dB.T).T
        core = left @ Q_A
        Q_out, R_out = torch.linalg.qr(right - Q_B @ (Q_B.T @ right))
        Q_in, R_in = torch.linalg.qr((left - core @ Q_A.T).T)
        S = R_B @ R_A.T - RATE * core
        top = torch.cat([S, -RATE * R_in.T], dim=1)
        bottom = torch.cat([-RATE * R_out, torch.zeros_like(S)], dim=1)
        U, s, Vt = torch.linalg.svd(torch.cat([top, bottom]))
        root = torch.sqrt(s[:r])
        B_new = torch.cat([Q_B, Q_out], dim=1) @ U[:, :r] * root
        return B_new, root[:, None] * (Vt[:r] @ torch.cat([Q_A, Q_in], dim=1).T)

    def run() -> Any:
        results = [one_pair(*pair) for pair in tensors]
        if device == "cuda":
            torch.cuda.synchronize()
        return results

    return run


def _grouped(pairs: list[Pair], method: str, basis: str = "singular") -> Callable[[], Any]:
    """Returns our exact step, batched by shape as in the optimizer."""
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair[0].shape, pair[1].shape), []).append(pair)
    batches = [
        tuple(jnp.asarray(np.stack(side)) for side in zip(*group, strict=True))
        for group in groups.values()
    ]

    @jax.jit
    def step(batches: list[Any]) -> list[Any]:
        return [
            exact_update(B, A, dB, dA, RATE, method=method, basis=basis) for B, A, dB, dA in batches
        ]

    return lambda: step(batches)


def _one_by_one(pairs: list[Pair]) -> Callable[[], Any]:
    """Returns the transcription in JAX, pair after pair in one compiled program."""
    on_device = jax.device_put(pairs)
    step = jax.jit(lambda pairs: [naive_jax(*pair) for pair in pairs])
    return lambda: step(on_device)


def main(arguments: Sequence[str]) -> None:
    """Runs the benchmark; see ``--help``."""
    parser = make_parser("exact_step", __doc__, "60m,130m,1b", rounds=5)
    parser.add_argument("--layers", type=int, default=1, help="layers that take the step")
    parser.add_argument(
        "--layers_of_others",
        type=int,
        help="time svd and the transcriptions with this number of layers and scale up: they take "
        "the pairs one by one, which is slow on a GPU; default: as --layers",
    )
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        help=f"methods of the exact step, some of {','.join(METHODS)}; default: all",
    )
    options = parse_options(parser, arguments, MODELS)
    methods = options.methods.split(",")
    for method in methods:
        if method not in METHODS:
            parser.error(f"--methods: unknown {method!r}; expected some of {', '.join(METHODS)}")
    others = options.layers if options.layers_of_others is None else options.layers_of_others
    if min(options.layers, others) < 1:
        parser.error(
            f"--layers, --layers_of_others: {options.layers}, {others}; expected 1 or more"
        )
    rows = []
    for model in options.models:
        shapes = layer_shapes(model)
        made = make_pairs(shapes * max(options.layers, others))
        pairs, fewer = made[: len(shapes) * options.layers], made[: len(shapes) * others]
        # Their time is proportional to the number of pairs, which they take one by one.
        slow = dict.fromkeys(("svd", "naive jax", "pytorch"), options.layers / others)
        candidates: dict[str, Callable[[], Any]] = {
            method: _grouped(fewer if method in slow else pairs, method) for method in methods
        }
        candidates["nearest"] = _grouped(pairs, METHODS[0], "nearest")
        candidates["naive jax"] = _one_by_one(fewer)
        in_torch = _torch_candidate(fewer)
        if in_torch is not None:
            candidates["pytorch"] = in_torch
        seconds = time_in_turns(candidates, options.rounds, _PAUSE)
        seconds = {name: slow.get(name, 1) * value for name, value in seconds.items()}
        row: dict[str, Any] = {"model": model, "pairs": len(pairs)}
        if others != options.layers:
            row["pairs of others"] = len(fewer)
        row |= {f"{name} ms": 1e3 * value for name, value in seconds.items()}
        for other in list(seconds)[1:]:
            row[f"{other} / {methods[0]}"] = seconds[other] / seconds[methods[0]]
        rows.append(row)
    report(rows, options)

"""Maintenance of methods with fixed arrays: ReLoRA's merges, SwitchLoRA's switches, SST's rounds.

All work on the nested dicts of a model: the factors B and A are in ``params``, the fixed arrays of
the same projection are at the same path in ``fixed``, and Adam's moments are at that path in the
optimizer's state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from loro_jax.fields import above, at_least, between, field, one_of
from loro_jax.peers.relora import merge_and_restart
from loro_jax.peers.sst import Spectral, constrained, next_round
from loro_jax.peers.switchlora import Candidates, SwitchState, hold, switch, thaw
from loro_jax.training.registry import Maintenance

if TYPE_CHECKING:
    from loro_jax.training.config import Config


@dataclasses.dataclass
class ReLoRAOptions:
    """Options of ReLoRA."""

    keep: float = field(0.001, between(0, 1), "fraction of the moments that a merge keeps")
    pruning: str = field(
        "random",
        one_of(("random", "magnitude")),
        "which moments a merge keeps: random ones, or the largest",
    )


@dataclasses.dataclass
class SwitchLoRAOptions:
    """Options of SwitchLoRA."""

    interval: float = field(
        40.0, above(0), "initial number of steps in which every vector is switched once"
    )
    ratio: float = field(
        0.1, above(0), "fraction of the run after which switches are a third as frequent"
    )
    freeze_steps: int = field(5, at_least(0), "updates for which a counterpart is frozen")


def relora_maintenance(config: Config, options: ReLoRAOptions) -> Maintenance:
    """Merges the factors into W every ``exact_every`` steps, and reinitialises them."""
    # alpha: the scale s of a projection is alpha / r.
    scale = config.model.alpha

    def restart(step: jax.Array, params: Any, fixed: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        key = _key(config, step)
        mu, nu = opt_state.factors.mu, opt_state.factors.nu
        # A number for each projection: its draws do not depend on those of the others.
        for number, path in enumerate(factor_paths(params)):
            own, weight = at_path(params, path), at_path(fixed, path)
            moments = tuple((at_path(m, path)["B"], at_path(m, path)["A"]) for m in (mu, nu))
            W, B, A, pruned = merge_and_restart(
                jax.random.fold_in(key, number),
                weight["W"],
                own["B"],
                own["A"],
                moments,
                scale=scale / own["A"].shape[-2],
                keep=options.keep,
                pruning=options.pruning,
            )
            params, fixed = with_leaves(params, path, B=B, A=A), with_leaves(fixed, path, W=W)
            mu = with_leaves(mu, path, B=pruned[0][0], A=pruned[0][1])
            nu = with_leaves(nu, path, B=pruned[1][0], A=pruned[1][1])
        return params, fixed, _with_moments(opt_state, mu, nu)

    def after(step: jax.Array, params: Any, fixed: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        # One program for all steps: on most of them the branch returns its arguments.
        return jax.lax.cond(
            step % config.exact_every == 0,
            restart,
            lambda _, *unchanged: unchanged,
            step,
            params,
            fixed,
            opt_state,
        )

    return Maintenance(after=after)


def switchlora_maintenance(config: Config, options: SwitchLoRAOptions) -> Maintenance:
    """Switches a few vectors at every step, and freezes their counterparts."""

    def before(
        step: jax.Array, grads: Any, params: Any, fixed: Any, opt_state: Any
    ) -> tuple[Any, Any, Any, Any]:
        key = _key(config, step)
        mu, nu = opt_state.factors.mu, opt_state.factors.nu
        for number, path in enumerate(factor_paths(params)):
            own, rest, grad = at_path(params, path), at_path(fixed, path), at_path(grads, path)
            moments = tuple((at_path(m, path)["B"], at_path(m, path)["A"]) for m in (mu, nu))
            state = SwitchState(
                rest["W"],
                own["B"],
                own["A"],
                Candidates(rest["spare_B"], rest["spare_A"], rest["switched"]),
                moments,
                (rest["frozen_B"], rest["frozen_A"]),
            )
            # The gradients are from before the switch, and still right: that of a switched vector
            # depends only on the function and on its counterpart, and neither changes.
            W, B, A, spare, moments, frozen = switch(
                jax.random.fold_in(key, number),
                step,
                state,
                scale=1 / own["A"].shape[-2],
                total_steps=config.steps,
                **dataclasses.asdict(options),
            )
            # In the order of the method: switch, hold the gradients, Adam (the optimizer's step),
            # thaw. Thawing before Adam changes nothing, as only `hold` reads the counts.
            grad_B, grad_A = hold(grad["B"], grad["A"], frozen)
            frozen_B, frozen_A = thaw(frozen)
            grads = with_leaves(grads, path, B=grad_B, A=grad_A)
            params = with_leaves(params, path, B=B, A=A)
            fixed = with_leaves(
                fixed,
                path,
                W=W,
                spare_B=spare.B,
                spare_A=spare.A,
                switched=spare.switched,
                frozen_B=frozen_B,
                frozen_A=frozen_A,
            )
            mu = with_leaves(mu, path, B=moments[0][0], A=moments[0][1])
            nu = with_leaves(nu, path, B=moments[1][0], A=moments[1][1])
        return grads, params, fixed, _with_moments(opt_state, mu, nu)

    return Maintenance(before=before)


def sst_maintenance(config: Config, options: Any) -> Maintenance:
    """Keeps vectors at length 1 in every step; begins a new round every ``exact_every`` steps."""

    def constrain(params: Any, fixed: Any) -> Any:
        for path in factor_paths(params):
            params = _with_trained(params, path, constrained(_spectral(params, fixed, path)))
        return params

    def restart(step: jax.Array, params: Any, fixed: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        key = _key(config, step)
        for number, path in enumerate(factor_paths(params)):
            state = _spectral(params, fixed, path)
            state = next_round(jax.random.fold_in(key, number), state)
            params = _with_trained(params, path, state)
            fixed = with_leaves(fixed, path, U=state.U, Vt=state.Vt, active=state.active)
        # Moments of embedding, head and norms stay, and so does Adam's count.
        of_pairs = opt_state.factors
        zeros = jax.tree.map(jnp.zeros_like, (of_pairs.mu, of_pairs.nu))
        opt_state = _with_moments(opt_state, *zeros)
        mu, nu = opt_state.regular.mu, opt_state.regular.nu
        for path in factor_paths(params):
            mu = with_leaves(mu, path, S=jnp.zeros_like(at_path(mu, path)["S"]))
            nu = with_leaves(nu, path, S=jnp.zeros_like(at_path(nu, path)["S"]))
        regular = opt_state.regular._replace(mu=mu, nu=nu)
        return params, fixed, opt_state._replace(regular=regular)

    def after(step: jax.Array, params: Any, fixed: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        return jax.lax.cond(
            step % config.exact_every == 0,
            restart,
            lambda _, *unchanged: unchanged,
            step,
            constrain(params, fixed),
            fixed,
            opt_state,
        )

    return Maintenance(after=after)


def _spectral(params: Any, fixed: Any, path: tuple[str, ...]) -> Spectral:
    parts = {**at_path(params, path), **at_path(fixed, path)}
    return Spectral(**{name: parts[name] for name in Spectral._fields})


def _with_trained(params: Any, path: tuple[str, ...], state: Spectral) -> Any:
    return with_leaves(params, path, S=state.S, B=state.B, A=state.A)


def _key(config: Config, step: jax.Array) -> jax.Array:
    # A different stream from that of the initialisation, which uses the seed directly.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1), step)


def _with_moments(opt_state: Any, mu: Any, nu: Any) -> Any:
    # Only moments change; Adam's count of steps continues.
    return opt_state._replace(factors=opt_state.factors._replace(mu=mu, nu=nu))


def factor_paths(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the paths of the dicts that contain B and A."""
    if {"B", "A"} <= params.keys():
        yield path
        return
    for name, value in params.items():
        if isinstance(value, dict):
            yield from factor_paths(value, (*path, name))


def at_path(tree: Any, path: tuple[str, ...]) -> Any:
    """Returns the dict at a path of nested dicts."""
    for name in path:
        tree = tree[name]
    return tree


def with_leaves(tree: Any, path: tuple[str, ...], **leaves: Any) -> Any:
    """Returns the tree with some leaves of the dict at a path replaced."""
    if not path:
        return tree | leaves
    return tree | {path[0]: with_leaves(tree[path[0]], path[1:], **leaves)}

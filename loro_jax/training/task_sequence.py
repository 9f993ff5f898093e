"""Methods for tasks that follow each other: what happens in their steps, and between their runs.

A run per task: with a run of the same method in ``config.init_from`` and a fresh optimizer, a run
begins the next task.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax

from loro_jax.fields import field
from loro_jax.peers import osft
from loro_jax.peers.coso import count_full
from loro_jax.peers.coso import next_task as next_task_of_coso
from loro_jax.training.adapters import at_path, factor_paths, with_leaves
from loro_jax.training.registry import Maintenance

if TYPE_CHECKING:
    from loro_jax.training.config import Config


@dataclasses.dataclass
class OSFTOptions:
    """Options of OSFT."""

    project_steps: bool = field(
        False,
        None,
        "whether steps, too, are projected away from the fixed directions, as gradients are",
    )


def osft_maintenance(config: Config, options: OSFTOptions) -> Maintenance:
    """Projects the trained directions after every step, if that is asked for."""
    if not options.project_steps:
        return Maintenance()

    def after(step: jax.Array, params: Any, fixed: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        for path in factor_paths(params):
            parts = osft.cleaned(_split_at(params, fixed, path))
            params = with_leaves(params, path, B=parts.B, A=parts.A)
        return params, fixed, opt_state

    return Maintenance(after=after)


def osft_next_task(options: OSFTOptions, before: Any, fresh: Any) -> tuple[Any, str]:
    """Splits all weights anew; the optimizer begins anew, too."""
    params, fixed = before.params, before.fixed
    for path in factor_paths(params):
        parts = osft.next_task(_split_at(params, fixed, path))
        params = with_leaves(params, path, B=parts.B, S=parts.S, A=parts.A)
        high = {"U_high": parts.U_high, "S_high": parts.S_high, "Vt_high": parts.Vt_high}
        fixed = with_leaves(fixed, path, **high)
    return fresh._replace(params=params, fixed=fixed), ""


def coso_next_task(options: Any, before: Any, fresh: Any) -> tuple[Any, str]:
    """Remembers the directions that the task has used; the optimizer begins anew otherwise.

    Returns:
        The state, and a warning if there is a matrix whose memory is full.
    """
    opt_state = next_task_of_coso(before.opt_state, options.threshold)
    full, total = count_full(opt_state)
    note = ""
    if full:
        note = (
            f"warning: the memory of earlier tasks' directions is full in {full} of {total} "
            "matrices, so directions beyond it are not protected "
            f"(config.method_options.memory = {options.memory})"
        )
    return fresh._replace(params=before.params, fixed=before.fixed, opt_state=opt_state), note


def _split_at(params: Any, fixed: Any, path: tuple[str, ...]) -> osft.Split:
    parts = {**at_path(params, path), **at_path(fixed, path)}
    return osft.Split(**{name: parts[name] for name in osft.Split._fields})

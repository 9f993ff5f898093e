"""Detects transformations after LORO in a chain, where none is allowed.

A transformation does not see the chain that it is part of. But while ``optax.chain`` calls the
``init`` of its members one by one, the call stack holds those that follow.
"""

from __future__ import annotations

import operator
import sys
import warnings
from types import FrameType


def warn_unless_last(name: str) -> None:
    """Warns if the ``init`` that calls this belongs to a member of a chain that is not the last.

    Args:
        name: the transformation's name, for the message.
    """
    after = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        # Chains may be nested: every optax frame on the stack counts its own members.
        if str(frame.f_globals.get("__name__", "")).startswith("optax."):
            after += _members_to_come(frame)
        frame = frame.f_back
    if after:
        noun = "transformation comes" if after == 1 else "transformations come"
        warnings.warn(
            f"{name}: {after} {noun} after it in a chain, but it must be the last. Its updates "
            "lead to new factors, and a part of an exact step, or more of it, is no step. Put "
            "what changes gradients before it, and schedules into its learning rate.",
            stacklevel=3,
        )


def _members_to_come(frame: FrameType) -> int:
    """Counts the members of a chain that follow, from a frame of its ``init``; 0 for others."""
    variables = frame.f_locals
    # The iterator of chain's comprehension: it has as many left as members that follow.
    if "fn" in variables and ".0" in variables:  # optax.chain
        return operator.length_hint(variables[".0"])
    if {"name", "transforms", "states"} <= set(variables):  # optax.named_chain
        names = [name for name, _ in variables["transforms"]]
        return len(names) - names.index(variables["name"]) - 1
    return 0

r"""Trains arms with many learning rates and seeds, all of an arm at the same time.

The members of an arm share one program, so that an accelerator trains dozens of small models in
the time of a few: all combinations of --lrs, --lr_scales (or --etas) and --seeds. For models of
which one fills a device, and for runs with checkpoints, use python -m loro_jax compare. Arms are
written as there. OUT/ARM.json is written as soon as an arm is done (until then, what there is after
each evaluation is in OUT/ARM.partial.json), and arms that have one are left out, so that the same
command again does the rest.

Example:
  python -m loro_jax sweep configs/default.py:recommended --arm=ours=loro \
      --arm=muon=full,direction=orthogonal --lr_scales=1.2,2.4,3.2 --seeds=0,1,2 --out=runs/sweep
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from loro_jax.command_line import Parser, failing_in_one_line
from loro_jax.commands.arms import add_arm_options, read_arms
from loro_jax.errors import TrainingError
from loro_jax.study.report import Arm, Run, config_of
from loro_jax.study.sweep import Member, Swept, members_of, sweep
from loro_jax.tables import environment, print_table, replacing
from loro_jax.training.config import Config


def main(arguments: Sequence[str]) -> int:
    """Runs ``python -m loro_jax sweep``; returns the exit status."""
    parser = Parser("python -m loro_jax sweep", __doc__)
    add_arm_options(parser, "", "runs/sweep")
    parser.add_argument("--lrs", help="peak learning rates; without it the config's")
    parser.add_argument("--lr_scales", help="multipliers of the projections' rate")
    parser.add_argument("--etas", help="in place of --lr_scales: the projections' rates themselves")
    options = parser.parse_args(arguments)
    options.command = " ".join(["python -m loro_jax sweep", *arguments])
    return failing_in_one_line(lambda: _sweep(options))


def _sweep(options: argparse.Namespace) -> int:
    base, arms, seeds = read_arms(options)
    rates = _numbers("--lrs", options.lrs) or [base.learning_rate]
    scales = _numbers("--lr_scales", options.lr_scales)
    etas = _numbers("--etas", options.etas)
    if scales and etas:
        raise TrainingError(
            "--lr_scales, --etas: expected one of them, because eta = lr_scale * lr."
        )
    configs = {arm.name: config_of(base, Run(arm, rates[0], seeds[0])) for arm in arms}
    for config in configs.values():  # all, before the first is trained
        config.validate()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for arm in arms:
        path = out / f"{arm.name}.json"
        if path.exists():
            print(f"{arm.name}: {path} exists")
            continue
        config = configs[arm.name]
        members = members_of(rates, scales or [config.lr_scale], seeds)
        if etas:
            members = [
                Member(rate, eta / rate, seed) for rate, eta, seed in product(rates, etas, seeds)
            ]
        partial = out / f"{arm.name}.partial.json"
        told = functools.partial(_tell, arm, config, members, options.command, partial)
        swept = sweep(config, members, told)
        print_table(summary(swept))
        partial.replace(path)  # written after the last evaluation, too
    return 0


def _tell(
    arm: Arm,
    config: Config,
    members: Sequence[Member],
    command: str,
    path: pathlib.Path,
    swept: Swept,
) -> None:
    """Prints a line after an evaluation, and writes all results so far."""
    losses = [loss for loss in swept.evaluations[-1].losses if math.isfinite(loss)]
    best = f"{math.exp(min(losses)):.2f}" if losses else "none"
    step = swept.evaluations[-1].step
    print(f"{arm.name}: step {step}, best perplexity {best} of {len(losses)} members", flush=True)
    content = {
        "command": command,
        "environment": environment(),
        "arm": {"name": arm.name, "method": arm.method, "changes": dict(arm.changes)},
        "config": dataclasses.asdict(config),
        **swept._asdict(),
        "members": [member._asdict() for member in members],
        "evaluations": [_finite(found._asdict()) for found in swept.evaluations],
        "rows": summary(swept),
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(swept: Swept) -> list[dict[str, Any]]:
    """Returns a row for each pair of rates: the mean perplexity of its seeds and each of them."""
    perplexities = dict(zip(swept.members, swept.perplexities(), strict=True))
    rows = []
    for rate, scale in dict.fromkeys((m.learning_rate, m.lr_scale) for m in swept.members):
        found = [
            perplexities[member]
            for member in swept.members
            if (member.learning_rate, member.lr_scale) == (rate, scale)
        ]
        done = [perplexity for perplexity in found if perplexity is not None]
        rows.append(
            {
                "learning rate": rate,
                "lr_scale": scale,
                "eta": None if scale is None else rate * scale,
                "perplexity": statistics.mean(done) if len(done) == len(found) else None,
                "seeds": ", ".join("diverged" if p is None else f"{p:.2f}" for p in found),
            }
        )
    return rows


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(name: str, text: str | None) -> list[float]:
    if text is None:
        return []
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        raise TrainingError(f"{name}={text}: expected numbers, separated by commas.") from None
    if not all(0 < one < math.inf for one in found):
        raise TrainingError(f"{name}={text}: expected numbers above 0.")
    return found

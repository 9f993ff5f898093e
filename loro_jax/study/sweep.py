"""Trains all rates and seeds of an arm at the same time, as one program: an ensemble.

A small model keeps an accelerator waiting for the next kernel most of the time. Here the members
of an ensemble, which differ only in their learning rates and their seeds, are an axis of every
array (:func:`jax.vmap`): twenty members take little longer than one and compile once. Each member
ends where a run of its own with the same rates, seed and data would end, up to rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from loro_jax.errors import TrainingError
from loro_jax.planning.flops import flops_per_token
from loro_jax.text import Corpus, load_corpus, train_iterator
from loro_jax.text.tokenizers.tokenizer import load_tokenizer
from loro_jax.training.batch import to_batch, validation_batches
from loro_jax.training.config import Config
from loro_jax.training.step import Program, make_program
from loro_jax.training.vocabulary import resolve_vocabulary
from models.loss import Batch

Array = jax.Array

# Most steps per call: their batches are on the device at the same time.
_MOST_STEPS = 64
# Scalars that count steps, by their names in the states. All members take the same steps, so that
# these have no axis of members, and what depends on them (when a step is exact) is a branch.
_COUNTERS = ("step", "count", "stale")


class Member(NamedTuple):
    """A member of an ensemble.

    Attributes:
        learning_rate: peak learning rate.
        lr_scale: multiplier of the projections' rate; None: the default of the method.
        seed: seed of initialisation and data order.
    """

    learning_rate: float
    lr_scale: float | None
    seed: int


class Evaluation(NamedTuple):
    """Losses of all members after some steps.

    Attributes:
        step: steps taken.
        losses: mean validation losses in nats, by member.
        train_losses: mean training losses since the evaluation before, by member.
    """

    step: int
    losses: list[float]
    train_losses: list[float]


class Swept(NamedTuple):
    """The result of an ensemble.

    Attributes:
        members: its members.
        evaluations: in the order of their steps; the last is after the last step.
        tokens: tokens that each member trained on.
        parameters: trained parameters of a member.
        flops_per_token: operations per token of a member, forward and backward.
        seconds: time from the first step's end to the last, evaluations included.
    """

    members: list[Member]
    evaluations: list[Evaluation]
    tokens: int
    parameters: int
    flops_per_token: float
    seconds: float

    def perplexities(self) -> list[float | None]:
        """Returns the last validation perplexities by member; None for those that diverged."""
        losses = self.evaluations[-1].losses
        return [math.exp(loss) if math.isfinite(loss) and loss < 700 else None for loss in losses]


def members_of(
    learning_rates: Sequence[float], lr_scales: Sequence[float | None], seeds: Sequence[int]
) -> list[Member]:
    """Returns all combinations, seeds varying fastest.

    Example:
        >>> [tuple(member) for member in members_of([0.01], [1.2, 2.4], [0])]
        [(0.01, 1.2, 0), (0.01, 2.4, 0)]
    """
    return [Member(*each) for each in itertools.product(learning_rates, lr_scales, seeds)]


def sweep(
    config: Config,
    members: Sequence[Member],
    told: Callable[[Swept], None] = lambda swept: None,
) -> Swept:
    """Trains an ensemble to the end, on one device, without checkpoints.

    Args:
        config: the config of every member, apart from its rates and seed.
        members: the members; all with an ``lr_scale``, or none.
        told: called after each evaluation, with the result so far.

    Returns:
        The result.

    Raises:
        TrainingError: for an invalid config, or members that can't share a program.
    """
    if not members or len({member.lr_scale is None for member in members}) > 1:
        raise TrainingError("sweep: expected members that all have an lr_scale, or none.")
    config, corpus = _inputs(config, members)
    program = _Ensemble(config, members)
    batches = _Batches(config, corpus, [member.seed for member in members])
    validation = _stacked(
        validation_batches(corpus, config.batch_size // config.gradient_accumulation)
    )
    state = program.init()
    parameters = sum(x.size for x in jax.tree.leaves(state.params)) // len(members)
    evaluations: list[Evaluation] = []
    # On the device until the next evaluation, so that it never waits for the next batches.
    waiting: list[tuple[Array, Array]] = []
    tokens, started = 0, 0.0
    for step in range(program.steps_at_once, config.steps + 1, program.steps_at_once):
        state, *found = program.train(state, batches.take(program.steps_at_once))
        waiting.append((found[0], found[1]))
        if not started:  # compilation does not count
            jax.block_until_ready(state)
            started = time.monotonic()
        if step % config.eval_every and step != config.steps:
            continue
        losses = np.asarray(program.evaluate(state, validation), np.float64)
        train = np.mean(np.concatenate([np.asarray(of_steps) for of_steps, _ in waiting]), axis=0)
        tokens += sum(int(count) for _, count in waiting)
        waiting.clear()
        evaluations.append(Evaluation(step, losses.tolist(), train.tolist()))
        seconds = time.monotonic() - started
        swept = Swept(
            list(members), evaluations, tokens, parameters, flops_per_token(config), seconds
        )
        told(swept)
    return swept


def _inputs(config: Config, members: Sequence[Member]) -> tuple[Config, Corpus]:
    """Validates the config of each member, and reads the text."""
    if config.distillation.teacher is not None:
        raise TrainingError(
            f"config.distillation.teacher = {config.distillation.teacher!r}: an ensemble has no "
            "teacher; expected None."
        )
    for member in members:
        with_member(config, member).validate()
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos_id, config.data.pad_id)
    config, _ = resolve_vocabulary(config, tokenizer)
    return config, load_corpus(config.data, config.sequence_length, tokenizer)


def with_member(config: Config, member: Any) -> Config:
    """Returns the config of one member; its numbers may be traced."""
    scale = config.lr_scale if member.lr_scale is None else member.lr_scale
    return dataclasses.replace(
        config, learning_rate=member.learning_rate, lr_scale=scale, seed=member.seed
    )


class _Ensemble:
    """The compiled functions of an ensemble."""

    def __init__(self, config: Config, members: Sequence[Member]):
        self.steps_at_once = _divisor(math.gcd(config.steps, config.eval_every), _MOST_STEPS)
        # Numbers of all members, as arrays along their axis.
        numbers = jax.tree.map(lambda *values: jnp.asarray(values), *members)

        def program(member: Any) -> Program:
            # Its seed may be traced, and NNX takes only keys that are.
            key: Any = jax.random.key(member.seed)
            return make_program(with_member(config, member._replace(seed=key)))

        of_member = _places([member.seed for member in members])
        axes = _axes(jax.eval_shape(lambda: program(members[0]).init()))
        create = jax.vmap(lambda member: program(member).init(), out_axes=axes)

        def step(carry: Any, batch: Batch) -> tuple[Any, Any]:
            taken = jax.vmap(
                lambda member, state, batch: program(member).train_step(state, batch),
                in_axes=(0, axes, 0),
                out_axes=(axes, 0),
            )
            carry, metrics = taken(numbers, carry, jax.tree.map(lambda x: x[of_member], batch))
            return carry, (metrics["loss"], metrics["tokens"][0])

        def train(state: Any, batches: Batch) -> tuple[Any, Array, Array]:
            state, (losses, tokens) = jax.lax.scan(step, state, batches)
            return state, losses, jnp.sum(tokens)

        def evaluate(state: Any, batches: Batch) -> Array:
            def add(total: Any, batch: Batch) -> tuple[Any, None]:
                sums = jax.vmap(
                    lambda params, fixed: program(members[0]).eval_step(params, fixed, batch)
                )(state.params, state.fixed)
                return jax.tree.map(jnp.add, total, sums), None

            zero = jnp.zeros(len(members), jnp.float32)
            (losses, tokens), _ = jax.lax.scan(add, (zero, zero), batches)
            return losses / tokens

        self.init = jax.jit(lambda: create(numbers))
        self.train = jax.jit(train, donate_argnums=0)
        self.evaluate = jax.jit(evaluate)


def _axes(state: Any) -> Any:
    """Returns the axis of members of each array of a member's state: 0, or None for counters."""

    def axis(path: tuple[Any, ...], x: Any) -> int | None:
        name = getattr(path[-1], "name", None)
        counts = name in _COUNTERS and x.shape == () and jnp.issubdtype(x.dtype, jnp.integer)
        return None if counts else 0

    return jax.tree_util.tree_map_with_path(axis, state)


def _divisor(number: int, most: int) -> int:
    """Returns the largest divisor of a number that is at most ``most``.

    Example:
        >>> _divisor(250, 64), _divisor(200, 64), _divisor(7, 64)
        (50, 50, 7)
    """
    return max(size for size in range(1, min(number, most) + 1) if number % size == 0)


def _places(seeds: Sequence[int]) -> np.ndarray:
    """Returns for each member the place of its seed among the sorted seeds."""
    return np.searchsorted(sorted(set(seeds)), seeds)


class _Batches:
    """The training batches of all seeds: members of one seed read the same."""

    def __init__(self, config: Config, corpus: Corpus, seeds: Sequence[int]):
        self._iterators: list[Iterator[Any]] = [
            train_iterator(
                config.data,
                corpus,
                batch_size=config.batch_size,
                sequence_length=config.sequence_length,
                seed=seed,
            )
            for seed in sorted(set(seeds))
        ]

    def take(self, steps: int) -> Batch:
        """Returns the batches of the next steps, arrays (steps, seeds, rows, length)."""
        taken = []
        for _ in range(steps):
            rows = [next(iterator) for iterator in self._iterators]
            of_seeds = [to_batch(row["tokens"], row["mask"]) for row in rows]
            taken.append(_stacked(of_seeds))
        return _stacked(taken)


def _stacked(batches: Sequence[Batch]) -> Batch:
    return jax.tree.map(lambda *x: np.stack(x), *batches)

"""The report at the end of a run: perplexity, memory, and next commands."""

from __future__ import annotations

import dataclasses
import shlex

import jax
import jax.numpy as jnp
from flax import nnx

from loro_jax.memory import Footprint, count_bytes, count_parameters, footprint
from loro_jax.text import Corpus
from loro_jax.text.ngram import NgramPerplexity, ngram_perplexity
from loro_jax.training.batch import to_batch
from loro_jax.training.config import Config
from loro_jax.training.distillation import abstract_teacher
from loro_jax.training.method_options import takes_direction, uses_field
from loro_jax.training.ranks import gates_of
from loro_jax.training.step import TrainState, make_program


def corpus_ngrams(corpus: Corpus, vocab_size: int) -> NgramPerplexity | None:
    """Computes unigram and bigram perplexity on the validation tokens; None if streamed."""
    if corpus.train_stream is None:
        return None
    batch = to_batch(corpus.validation_tokens, corpus.validation_mask)
    counted = batch.mask > 0
    return ngram_perplexity(
        corpus.train_stream, batch.inputs[counted], batch.targets[counted], vocab_size
    )


def run_footprint(config: Config) -> Footprint:
    """Counts parameters and bytes of a run by abstract evaluation."""
    return _footprint_of(_shapes(config))


def _shapes(config: Config) -> TrainState:
    """Returns shapes and dtypes of a run's state."""
    return jax.eval_shape(make_program(config).init)


def _footprint_of(state: TrainState) -> Footprint:
    counted = footprint(state.params, state.opt_state)
    # Fixed arrays take memory, too; indices are no parameters.
    fixed = [x for x in jax.tree.leaves(state.fixed) if jnp.issubdtype(x.dtype, jnp.floating)]
    return dataclasses.replace(
        counted,
        parameters=counted.parameters + count_parameters(fixed),
        weight_bytes=counted.weight_bytes + count_bytes(state.fixed),
    )


def final_report(
    config: Config,
    val_ppl: float,
    ngrams: NgramPerplexity | None,
    workdir: str,
    command: str,
    live_ranks: int | None = None,
    state: TrainState | None = None,
) -> list[str]:
    """Returns lines to print at the end of a run.

    Args:
        config: the run's config.
        val_ppl: its last validation perplexity.
        ngrams: perplexities of n-gram models on the same tokens, if known.
        workdir: the run directory.
        command: the command of the run, with its flags.
        live_ranks: ranks that its adapters have at the end, if its method chooses them.
        state: shapes and dtypes of its state; None: they are evaluated first.

    Returns:
        The lines.
    """
    lines = ["", f"validation perplexity {val_ppl:.2f}"]
    if ngrams is not None:
        lines[-1] += (
            f"  (unigram model {ngrams.unigram:.2f}, bigram model {ngrams.bigram:.2f}, "
            "same tokens, same tokenizer)"
        )
    state = _shapes(config) if state is None else state
    if config.has_adapters:
        return [*lines, *_of_adapters(config, workdir, live_ranks, state)]
    own = _footprint_of(state)
    lines.append(_footprint_line(f"this model ({config.method})", own))
    teacher = abstract_teacher(config)
    if teacher is not None:
        held = count_bytes(nnx.state(teacher))
        lines.append(f"its teacher, while it trains: {held / 1e6:.1f} MB more")
    if config.method != "full":
        twin = dataclasses.replace(config, method="full")
        # The run's direction may have no counterpart for dense projections.
        if not takes_direction(twin):
            twin = dataclasses.replace(twin, direction=Config().direction)
        dense = run_footprint(twin)
        lines.append(_footprint_line("its dense twin", dense))
        lines.append(
            f"  {own.parameters / dense.parameters:.2f} of the parameters, "
            f"{own.total_bytes / dense.total_bytes:.2f} of the memory"
        )
    dashboard = [f"tensorboard --logdir {workdir}"] if config.tensorboard else []
    return [
        *lines,
        f"run directory {workdir}: metrics.jsonl, config.json, checkpoints/, plot.png",
        "",
        "next:",
        *(f"  {line}" for line in dashboard),
        "  # the dense twin, and plain Adam on the same factors",
        f"  {_by(config, 'full', command)} --workdir={workdir}_full",
        f"  {_by(config, 'lowrank', command)} --workdir={workdir}_lowrank",
        "  # the paper's 60M on C4",
        "  python train.py --config=configs/llama_60m.py --workdir=runs/60m",
    ]


def _of_adapters(
    config: Config, workdir: str, live_ranks: int | None, state: TrainState
) -> list[str]:
    """Returns the lines about a run that fine-tunes by adapters."""
    trained, fixed = count_parameters(state.params), count_parameters(state.fixed)
    live = []
    if live_ranks is not None:
        total = sum(gates.size for gates in gates_of(config, state.params))
        live = [f"live ranks: {live_ranks} of {total}"]
    return [
        f"{config.adapter_kind} adapters ({config.method}): {trained / 1e6:.2f}M trained "
        f"parameters ({trained / (trained + fixed):.2%} of {(trained + fixed) / 1e6:.2f}M), "
        f"optimizer {count_bytes(state.opt_state) / 1e6:.1f} MB",
        *live,
        f"run directory {workdir}: metrics.jsonl, config.json, checkpoints/, plot.png",
        "",
        "next:",
        f'  python -m loro_jax generate {workdir} --prompt="..."',
        "  # the whole model with merged adapters, for other programs",
        f"  python -m loro_jax export {workdir} {workdir}_merged",
        "  # the adapters alone, in PEFT's format",
        f"  python -m loro_jax export {workdir} {workdir}_adapters --adapter",
    ]


def _by(config: Config, method: str, command: str) -> str:
    """Returns the command of the same run by another method, without fields it does not use."""
    other = dataclasses.replace(config, method=method)
    kept: list[str] = []
    drop_value = False
    for argument in shlex.split(command):
        # A flag and its value may be one word (with =) or two.
        if drop_value and not argument.startswith("-"):
            drop_value = False
            continue
        flag, has_value, _ = argument.lstrip("-").partition("=")
        drop_value = False
        if flag.startswith("config.") and not uses_field(other, flag.removeprefix("config.")):
            drop_value = not has_value
            continue
        kept.append(shlex.quote(argument))
    return " ".join([*kept, f"--config.method={method}"])


def _footprint_line(name: str, counted: Footprint) -> str:
    parts = (counted.weight_bytes, counted.gradient_bytes, counted.optimizer_bytes)
    weights, gradients, optimizer, total = (part / 1e6 for part in (*parts, counted.total_bytes))
    return (
        f"{name}: {counted.parameters / 1e6:.2f}M parameters; weights {weights:.1f} "
        f"+ gradients {gradients:.1f} + optimizer {optimizer:.1f} = {total:.1f} MB"
    )

"""The configuration of a run: typed dataclasses, validated before anything else happens.

Each field is defined once, with its type, default, range and meaning; ``python train.py --help``
prints them all.
"""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from loro_jax.errors import TrainingError
from loro_jax.exact import BASES
from loro_jax.exact import METHODS as METHODS_OF_EXACT_STEP
from loro_jax.fields import Range, above, at_least, between, check, either, field, nested, one_of
from loro_jax.layers.adapters import ADAPTERS
from loro_jax.layers.projections import IN_PARTS, PROJECTIONS
from loro_jax.loro import MOMENTS_OF_BASIS
from loro_jax.text.config import DataConfig
from loro_jax.training.adapter_checks import check_adapters
from loro_jax.training.method_options import (
    MethodOptions,
    check_options,
    resolved_options,
    takes_direction,
)
from loro_jax.training.methods import DIRECTIONS, METHODS, make_maintenance, make_schedule
from models.llama import LlamaConfig

_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
MOMENTS = ("auto", "reset", "reset_factors", "transport", "keep")


@dataclasses.dataclass
class MeshConfig:
    """Numbers of devices along the axes of the mesh; -1: all remaining devices."""

    data: int = field(-1, None, "devices that shard the batch; parameters are replicated")
    fsdp: int = field(
        1, None, "devices that shard the batch, and also parameters and optimizer state"
    )
    tensor: int = field(1, None, "devices that shard the projections")


# Patterns of what adapters leave fixed, unless it is asked for.
_REST = {
    "embedding": ("embedding",),
    "head": ("head",),
    "norms": ("norm", "blocks/*_norm"),
}


@dataclasses.dataclass
class AdapterConfig:
    """Adapters: changes of weights that are trained beside a fixed network."""

    kind: str = field(
        "none",
        Range(
            lambda: f"one of none, {', '.join(ADAPTERS)}",
            lambda kind: kind == "none" or kind in ADAPTERS,
            listed=True,
        ),
        "kind of the adapters beside dense projections; none: everything is trained",
    )
    rank: int = field(8, at_least(1), "rank of the adapters")
    alpha: float = field(16.0, above(0), "their product is scaled by alpha / rank")
    rank_stabilised: bool = field(
        False, None, "whether it is scaled by alpha / sqrt(rank) instead (rsLoRA)"
    )
    targets: str = field(
        "all", None, "projections with adapters: all, or names with commas, such as q,k"
    )
    initialiser: str | None = field(
        None,
        None,
        "how their factors are drawn, as model.initialiser; none: as the kind says, with a change "
        "of zero. With others, such as xavier, the first change is subtracted from the weights",
    )
    init_from: str | None = field(
        None,
        None,
        "a directory in PEFT's format whose adapters training continues, beside their base in "
        "config.init_from; kind, rank, alpha and targets are those of the directory",
    )
    start_sequences: int = field(
        64,
        at_least(1),
        "sequences of the training text from whose mean gradient adapters start (lora_sb)",
    )
    density: float = field(
        0.005, above(0, most=1), "share of a weight's entries that are trained (sltrain)"
    )
    trained: str = field(
        "",
        None,
        f"what else is trained, with commas: {', '.join(_REST)}",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the projections with adapters."""
        return _PROJECTIONS if self.targets == "all" else tuple(self.targets.split(","))

    @property
    def also(self) -> tuple[str, ...]:
        """Patterns of what else is trained."""
        asked = self.trained.split(",") if self.trained else []
        return tuple(pattern for name in asked for pattern in _REST[name])


@dataclasses.dataclass
class DistillationConfig:
    """Distillation from a dense teacher beside the loss, as in PELA."""

    teacher: str | None = field(
        None,
        None,
        "a directory of a Hugging Face LLaMA, or of a run, of the same architecture; none: no "
        "distillation",
    )
    features: float = field(
        0.0, at_least(0), "weight of the mean squared error of the layers' outputs (PELA: 1)"
    )
    penalty: float = field(
        0.0,
        at_least(0),
        "weight of the squared largest differences of B A from the teacher's W",
    )
    tolerance: float = field(
        1e-3, at_least(0), "differences up to this size are free of the penalty"
    )


@dataclasses.dataclass
class Config:
    """The config of a run. Defaults are the paper's for 60M."""

    method: str = field("loro", one_of(METHODS), "how the model is trained")
    steps: int = field(10_000, at_least(1), "optimizer steps in the run")
    seed: int = field(0, between(0, 2**32 - 1), "fixes initialisation and the order of the data")
    init_from: str | None = field(
        None,
        None,
        "a directory of a Hugging Face LLaMA, dense or with factors: the run uses its "
        "architecture and starts from its weights (factors: from their truncated SVD). Or a run "
        "directory of the same method: with model.num_layers a multiple of its layers, its stack "
        "is repeated",
    )
    init_optimizer: str = field(
        "fresh",
        one_of(("fresh", "copied")),
        "with a run in init_from: a new optimizer state at step 0, or that run's, at its step; "
        "methods for several tasks (osft, coso) begin the next one with a new state",
    )
    batch_size: int = field(512, at_least(1), "sequences per optimizer step, on all devices")
    sequence_length: int = field(256, at_least(1), "tokens per sequence")
    gradient_accumulation: int = field(
        1, at_least(1), "micro-batches per optimizer step; must divide batch_size"
    )
    learning_rate: float = field(0.01, above(0), "peak of the schedule")
    warmup_steps: int = field(
        1_000, at_least(0), "linear warm-up at the start, included in the run's steps"
    )
    initial_lr_ratio: float = field(0.1, between(0, 1), "first learning rate / peak")
    final_lr_ratio: float = field(0.1, between(0, 1), "last learning rate / peak")
    decay: str = field(
        "cosine", either("cosine", "linear"), "how the rate falls from its peak to the last one"
    )
    restart_warmup_steps: int = field(
        5, at_least(0), "re-warm-up after each exact step, restart or merge; 0: none"
    )
    exact_every: int = field(
        500,
        at_least(0),
        "K: step t, from 0, is exact when (t + 1) % K == 0; 0: never. Methods without exact steps "
        "restart, merge or renew their projectors every K steps",
    )
    direction: str = field(
        "adam",
        one_of(DIRECTIONS),
        "direction of the factors (loro) or the dense projections (full; orthogonal is Muon there)",
    )
    moments: str = field(
        "auto",
        one_of(MOMENTS),
        "moments at an exact step: reset those of all leaves or of the factors, transport the "
        "factors' into the new basis, or keep all; auto follows the basis: singular resets, "
        "nearest keeps",
    )
    max_move: float = field(
        0.0,
        at_least(0),
        "trust region of the exact step, relative to the norm of the product; 0: none",
    )
    damping: float = field(
        0.0,
        at_least(0),
        "damping of the inverses in the exact step, relative to the mean square of the factor's "
        "singular values; 0: none",
    )
    exact_method: str = field(
        "graph",
        one_of(METHODS_OF_EXACT_STEP),
        "how the exact step is computed: graph is the fastest, svd the reference",
    )
    basis: str = field(
        "singular",
        one_of(BASES),
        "basis of the new factors after an exact step: singular, the paper's, or nearest to the "
        "old factors",
    )
    lr_scale: float | None = field(
        None,
        above(0),
        "multiplies the learning rate of the factors (in LORO's approximate steps), or of the "
        "dense projections of full; none: r / min(m, n) for loro and svd_projection, 2.4 for loro "
        "with direction orthogonal (learning_rate 0.01 then moves products by 0.024 in spectral "
        "norm), 1.2 for full by Muon, 1 for the others",
    )
    b1: float = field(0.9, at_least(0, below=1), "decay of Adam's first moment")
    b2: float = field(0.999, at_least(0, below=1), "decay of Adam's second moment")
    eps: float = field(1e-6, above(0), "Adam's epsilon")
    weight_decay: float = field(0.0, at_least(0), "decoupled weight decay")
    clip_norm: float = field(
        0.0, at_least(0), "largest global norm of the gradient; 0: no clipping"
    )
    log_every: int = field(10, at_least(1), "steps between training rows")
    eval_every: int = field(1_000, at_least(1), "steps between evaluations (and one at the end)")
    published_ppl: bool = field(
        False,
        None,
        "evaluations also print the perplexity that evaluators of published tables would print, "
        "and the number of batches (of batch_size / gradient_accumulation sequences)",
    )
    checkpoint_every: int = field(
        1_000, at_least(1), "steps between checkpoints (and one at the end)"
    )
    keep_checkpoints: int = field(2, at_least(1), "number of latest checkpoints to keep")
    inspect_every: int = field(
        0,
        at_least(0),
        "steps between rows of inspect.jsonl: condition number, norm and stable rank of every "
        "product B A and factor; 0: never",
    )
    tensorboard: bool = field(True, None, "also write TensorBoard event files")
    method_options: MethodOptions = nested(
        MethodOptions, "fields of the chosen method or direction"
    )
    model: LlamaConfig = nested(LlamaConfig, "architecture and precision")
    adapter: AdapterConfig = nested(AdapterConfig, "adapters, for fine-tuning")
    distillation: DistillationConfig = nested(
        DistillationConfig, "a dense teacher, for healing compressed models"
    )
    data: DataConfig = nested(DataConfig, "corpus and tokenizer")
    mesh: MeshConfig = nested(MeshConfig, "devices")

    def __post_init__(self) -> None:
        """Copies the options, which may have been given as a dict."""
        self.method_options = MethodOptions(self.method_options)

    def validate(self) -> None:
        """Raises TrainingError for an invalid value, naming the field and the expected values."""
        try:
            for problem in self.checks():
                problem(self)
        except ValueError as error:
            raise TrainingError(f"config.{error}") from None

    def checks(self) -> Sequence[Callable[[Any], object]]:
        """Returns the checks of a config; each raises ValueError for what is invalid."""
        return CHECKS

    @property
    def short_warmup(self) -> int:
        """Warm-up steps for this number of steps: a tenth, as in all configs of the repository."""
        return self.steps // 10

    @property
    def model_config(self) -> LlamaConfig:
        """Network of this run: ``model`` with the projections of the method."""
        method = METHODS[self.method]
        if method.projection is None or self.has_adapters:
            return self.model.dense()
        if self.model.projection in method.other_projections:
            return self.model
        return dataclasses.replace(self.model, projection=method.projection)

    @property
    def adapter_kind(self) -> str:
        """The kind of adapters, which a method may have of its own; "none": there are none."""
        return METHODS[self.method].adapter or self.adapter.kind

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are trained beside fixed projections."""
        return self.adapter_kind != "none"

    @property
    def resolved_moments(self) -> str:
        """The treatment of moments: "auto" follows the basis."""
        return resolved_moments_of(self.moments, self.basis)

    def to_json(self) -> str:
        """Returns the config as JSON with all fields, including the method's options."""
        content = dataclasses.asdict(self)
        if self.method in METHODS and self.direction in DIRECTIONS:
            content["method_options"] = resolved_options(self)
        return json.dumps(content, indent=2) + "\n"


def _fields(config: Config) -> None:
    check(config)
    check(config.data, "data.")
    check(config.mesh, "mesh.")
    check(config.adapter, "adapter.")
    check(config.distillation, "distillation.")


def _warmup_within_steps(config: Config) -> None:
    if config.warmup_steps > config.steps:
        raise ValueError(
            f"warmup_steps must be at most steps = {config.steps}, but is {config.warmup_steps}; "
            f"say --config.warmup_steps={config.short_warmup}, a tenth of the steps."
        )


def _period(config: Config) -> None:
    if config.exact_every < 1 and METHODS[config.method].periodic:
        raise ValueError(
            f'exact_every must be at least 1 with config.method = "{config.method}", but is '
            f"{config.exact_every}."
        )


def _direction_of_dense(config: Config) -> None:
    if "direction" in METHODS[config.method].uses and not takes_direction(config):
        known = [name for name, direction in DIRECTIONS.items() if direction.dense is not None]
        raise ValueError(
            f"direction must be one of {', '.join(known)} with config.method = "
            f'"{config.method}", but is {config.direction!r}.'
        )


def _micro_batches(config: Config) -> None:
    if config.batch_size % config.gradient_accumulation:
        raise ValueError(
            f"batch_size = {config.batch_size} must be a multiple of "
            f"config.gradient_accumulation = {config.gradient_accumulation}."
        )


def _length(config: Config) -> None:
    if config.sequence_length > config.model.max_sequence_length:
        raise ValueError(
            f"sequence_length = {config.sequence_length} is longer than the model's "
            f"config.model.max_sequence_length = {config.model.max_sequence_length}."
        )


def _network(config: Config) -> None:
    model = config.model_config
    # The other fields can be checked before the tokenizer is loaded.
    if model.vocab_size == 0:  # set from the tokenizer's
        model = dataclasses.replace(model, vocab_size=1)
    model.validate()


def _adapters(config: Config) -> None:
    if not config.has_adapters:
        return
    shapes = config.model.shapes("attn") | config.model.shapes("mlp")
    check_adapters(config, {name: min(shape) for name, shape in shapes.items()}, _REST)
    if config.model.tie_embeddings and "head" in config.adapter.trained.split(","):
        raise ValueError(
            "adapter.trained = 'head': this model's head is its embedding "
            "(model.tie_embeddings); expected 'embedding'."
        )


def _activation_without_exact_steps(config: Config) -> None:
    if config.has_adapters:
        return
    projection = config.model_config.projection
    linear = PROJECTIONS[projection].linear
    if not linear and "basis" in METHODS[config.method].uses and config.exact_every:
        raise ValueError(
            f"exact_every = {config.exact_every}: an exact step gives the product B A new "
            f'factors, which mean another function with config.model.projection = "{projection}" '
            '(an activation stands between them); expected 0 (never), or projection "low_rank".'
        )


def _factors(config: Config) -> None:
    if config.has_adapters:
        return
    if METHODS[config.method].projection is not None and config.model.scope == "none":
        raise ValueError(
            f'method = {config.method!r} needs factors, but config.model.scope is "none"; '
            'expected "all", "attn" or "mlp" (or method "full").'
        )


def _inspected(config: Config) -> None:
    if config.inspect_every == 0:
        return
    if config.has_adapters:
        found = ADAPTERS[config.adapter_kind].has_pair
    else:
        found = METHODS[config.method].projection not in (None, *IN_PARTS)
    if not found:
        who = f"method {config.method!r} has"
        if config.has_adapters:
            who = f"adapters of kind {config.adapter_kind!r} have"
        raise ValueError(
            f"inspect_every = {config.inspect_every}: {who} no product B A; "
            "expected 0 (python -m loro_jax inspect reads the checkpoints)."
        )


def _distillation(config: Config) -> None:
    terms = config.distillation
    weighted = [name for name in ("features", "penalty") if getattr(terms, name)]
    if terms.teacher is None and weighted:
        raise ValueError(
            f"distillation.{weighted[0]} = {getattr(terms, weighted[0])} needs a directory in "
            "config.distillation.teacher, which is None."
        )
    if terms.teacher is not None and not weighted:
        raise ValueError(
            f"distillation.teacher = {terms.teacher!r} has no effect: config.distillation.features "
            "and config.distillation.penalty are 0; expected one of them above 0."
        )
    model = config.model_config
    factored = any(model.projection_rank(name) for name in _PROJECTIONS)
    plain = model.projection == "low_rank" and not config.has_adapters
    if terms.penalty and not (factored and plain):
        raise ValueError(
            f"distillation.penalty = {terms.penalty}: this run, of method {config.method!r}, has "
            "no pairs whose product B A is a weight; expected 0, or method loro or lowrank with "
            'config.model.projection = "low_rank", without adapters.'
        )


# Checks of combinations of fields that runs of every kind have; each raises ValueError.
SHARED_CHECKS: tuple[Callable[[Any], object], ...] = (
    check_options,
    _warmup_within_steps,
    _period,
    _direction_of_dense,
    _micro_batches,
    _inspected,
    make_schedule,
)

# Those of single fields come first.
CHECKS: tuple[Callable[[Any], object], ...] = (
    _fields,
    *SHARED_CHECKS[:-1],
    _length,
    _network,
    _adapters,
    _activation_without_exact_steps,
    _factors,
    _distillation,
    make_schedule,
    make_maintenance,
)


def resolved_moments_of(moments: str, basis: str) -> str:
    """Returns the treatment of moments of a config, in which "auto" follows the basis."""
    if moments != "auto":
        return moments
    # A stored config may name an unknown basis; validation reports it.
    return MOMENTS_OF_BASIS.get(basis, "reset")

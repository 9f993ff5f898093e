"""The configuration of a run: typed dataclasses, checked before anything is touched."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
import json
import math
from typing import Any

from loro_jax.descent import REFRESH_CHOICES
from loro_jax.errors import TrainingError
from loro_jax.exact import BASES
from loro_jax.exact import METHODS as METHODS_OF_EXACT_STEP
from loro_jax.text.config import DataConfig
from models.llama import LlamaConfig

# What --config.method may say, and the projections that it trains (None: dense ones).
METHODS: dict[str, str | None] = {
    "loro": "low_rank",
    "lowrank": "low_rank",
    "lowrank_restarts": "low_rank",
    "svd_projection": "low_rank",
    "preconditioned": "low_rank",
    "preconditioned_exact": "low_rank",
    "spectron": "low_rank",
    "cola": "cola",
    "sltrain": "sltrain",
    "lora": "lora",
    "relora": "lora",
    "switchlora": "switchlora",
    "galore": None,
    "fira": None,
    "adarankgrad": None,
    "full": None,
}

# Methods that restart, merge or renew a projector every K-th step: K can't be "never" for them.
PERIODIC_METHODS = (
    "lowrank_restarts",
    "svd_projection",
    "preconditioned_exact",
    "relora",
    "switchlora",
    "galore",
    "fira",
    "adarankgrad",
)

# Directions of LORO's factors.
DIRECTIONS = ("adam", "orthogonal")

# Kinds that "loro" trains where model.projection asks for them.
LORO_PROJECTIONS = ("low_rank", "cola", "sltrain")

# Fields that may differ between a run directory and the command that continues it, because the
# trajectory and the metrics do not depend on them.
RESUMABLE_FIELDS = (
    "checkpoint_every",
    "keep_checkpoints",
    "tensorboard",
    "mesh",
    "data.prefetch",
    "data.threads",
)


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis of the mesh; -1: all that are left.

    Attributes:
        data: the batch is split, parameters are copied.
        fsdp: the batch is split, and parameters and optimizer state are too.
        tensor: projections are split between devices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class Config:
    """One run. Defaults are the paper's for 60M.

    Attributes:
        method: "loro", or a method that it is compared with: "full" (the dense twin by Adam or,
            with ``direction`` "orthogonal", by Muon), "lowrank" (the factors by Adam),
            "lowrank_restarts", "svd_projection", "preconditioned", "preconditioned_exact",
            "spectron", "cola", "sltrain", "lora", "relora", "switchlora", "galore", "fira" or
            "adarankgrad"; see :mod:`loro_jax.training.methods`.
        steps: optimizer steps in the run.
        seed: fixes initialisation and the order of the data.
        init_from: a directory of a Hugging Face LLaMA, dense or with its factors kept: the run
            takes its architecture and starts from its weights (factors: from their truncated SVD);
            None: fresh weights.
        batch_size: sequences per optimizer step, over all devices.
        sequence_length: tokens per sequence.
        gradient_accumulation: micro-batches that one step is split into.
        learning_rate: peak of the schedule.
        warmup_steps: linear warm-up at the start, part of ``steps``.
        initial_lr_ratio: first learning rate over the peak.
        final_lr_ratio: last learning rate over the peak.
        restart_warmup_steps: re-warm-up after each exact step; 0: none.
        exact_every: K; step t, from 0, is exact when ``(t + 1) % K == 0``; 0: never ("loro").
            Other methods restart, or renew their projectors, as often.
        direction: of LORO's factors, "adam" or "orthogonal" (:func:`loro_jax.orthogonal`, whose
            learning rate is of another size: see ``lr_scale``). Of the projections of "full",
            "orthogonal" is Muon (:func:`loro_jax.peers.muon.muon`).
        momentum: decay of the averaged gradients, with ``direction`` "orthogonal".
        projection_scale: alpha, on the steps of projected gradients ("galore" and its kin).
        refresh: whose Adam state an exact step zeroes: "all", "factors" or "none"; "transport"
            carries the factors' moments into their new basis instead.
        max_move: trust region of the exact step, over the norm of the product; 0: none.
        damping: of the inverses in the exact step, over the mean square of the factor's singular
            values; 0: none.
        exact_method: "graph" (the fastest), "gram" or "svd" (the reference).
        basis: of the factors that an exact step gives ("loro"): "singular", the paper's, or
            "nearest" to the old ones, where moments may stay (``refresh`` "none" and no
            ``restart_warmup_steps``).
        lr_scale: factor on the learning rate of the factors alone (of LORO's approximate steps),
            or of the dense projections of "full"; None: r / min(m, n) for "loro" and
            "svd_projection", 2.4 for a ``direction`` other than "adam" (so that ``learning_rate``
            0.01 moves products by 0.024 in their spectral norm; for "full" by Muon 1.2), 1 for the
            other methods.
        b1: decay of Adam's first moment.
        b2: decay of Adam's second moment.
        eps: Adam's epsilon.
        weight_decay: decoupled weight decay.
        clip_norm: largest global norm of the gradient; 0: no clipping.
        log_every: steps between training rows.
        eval_every: steps between evaluations (and one at the end).
        checkpoint_every: steps between checkpoints (and one at the end).
        keep_checkpoints: how many of the latest checkpoints stay on disk.
        tensorboard: also write TensorBoard event files.
        model: architecture and precision.
        data: corpus and tokenizer.
        mesh: devices.
    """

    method: str = "loro"
    steps: int = 10_000
    seed: int = 0
    init_from: str | None = None
    batch_size: int = 512
    sequence_length: int = 256
    gradient_accumulation: int = 1
    learning_rate: float = 0.01
    warmup_steps: int = 1_000
    initial_lr_ratio: float = 0.1
    final_lr_ratio: float = 0.1
    restart_warmup_steps: int = 5
    exact_every: int = 500
    direction: str = "adam"
    momentum: float = 0.95
    projection_scale: float = 0.25
    refresh: str = "all"
    max_move: float = 0.0
    damping: float = 0.0
    exact_method: str = "graph"
    basis: str = "singular"
    lr_scale: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    log_every: int = 10
    eval_every: int = 1_000
    checkpoint_every: int = 1_000
    keep_checkpoints: int = 2
    tensorboard: bool = True
    model: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def validate(self) -> None:
        """Raises TrainingError, naming field, value and what was expected, for a bad value."""
        if self.method not in METHODS:
            raise TrainingError(_expected("method", f"one of {', '.join(METHODS)}", self.method))
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "gradient_accumulation",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "warmup_steps",
            "restart_warmup_steps",
            "weight_decay",
            "clip_norm",
            "max_move",
            "damping",
            "projection_scale",
        ):
            self._require(name, getattr(self, name) >= 0, "at least 0")
        if self.warmup_steps > self.steps:
            expected = f"at most steps = {self.steps}"
            hint = f"say --config.warmup_steps={self.short_warmup}, a tenth of the steps."
            raise TrainingError(
                f"{_expected('warmup_steps', expected, self.warmup_steps)[:-1]}; {hint}"
            )
        self._require("seed", 0 <= self.seed < 2**32, f"between 0 and {2**32 - 1}")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "above 0 and finite")
        self._require("eps", self.eps > 0, "above 0")
        if self.exact_every < 1 and self.method in PERIODIC_METHODS:
            expected = f'at least 1 with config.method = "{self.method}"'
            raise TrainingError(_expected("exact_every", expected, self.exact_every))
        self._require("exact_every", self.exact_every >= 0, "at least 0")
        if self.direction not in DIRECTIONS:
            expected = f"one of {', '.join(DIRECTIONS)}"
            raise TrainingError(_expected("direction", expected, self.direction))
        for name in ("b1", "b2", "momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("initial_lr_ratio", "final_lr_ratio"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        if self.refresh_choice not in REFRESH_CHOICES:
            raise TrainingError(
                _expected("refresh", 'one of "all", "factors", "transport", "none"', self.refresh)
            )
        if self.exact_method not in METHODS_OF_EXACT_STEP:
            expected = f"one of {', '.join(METHODS_OF_EXACT_STEP)}"
            raise TrainingError(_expected("exact_method", expected, self.exact_method))
        if self.basis not in BASES:
            raise TrainingError(_expected("basis", f"one of {', '.join(BASES)}", self.basis))
        if self.lr_scale is not None:
            self._require("lr_scale", self.lr_scale > 0, "above 0")
        if self.batch_size % self.gradient_accumulation:
            raise TrainingError(
                f"config.batch_size = {self.batch_size} must be a multiple of "
                f"config.gradient_accumulation = {self.gradient_accumulation}."
            )
        if self.sequence_length > self.model.max_sequence_length:
            raise TrainingError(
                f"config.sequence_length = {self.sequence_length} is longer than the model's "
                f"config.model.max_sequence_length = {self.model.max_sequence_length}."
            )
        for name, choices in (
            ("shape", ("packed", "padded")),
            ("text_files", ("paragraphs", "documents")),
            ("bad_documents", ("stop", "skip")),
        ):
            value = getattr(self.data, name)
            if value not in choices:
                expected = " or ".join(f'"{choice}"' for choice in choices)
                raise TrainingError(_expected(f"data.{name}", expected, value))
        for name, least in (
            ("max_eval_sequences", 0),
            ("prefetch", 0),
            ("threads", 0),
            ("vocab_multiple", 1),
        ):
            value = getattr(self.data, name)
            if value < least:
                raise TrainingError(_expected(f"data.{name}", f"at least {least}", value))
        model = self.model_config
        if model.vocab_size == 0:  # set from the tokenizer's
            model = dataclasses.replace(model, vocab_size=1)
        try:
            model.validate()
        except ValueError as error:
            raise TrainingError(f"config.{error}") from None
        if model.projection == "cola" and self.method == "loro" and self.exact_every:
            raise TrainingError(
                f"config.exact_every = {self.exact_every}: an exact step gives the product B A new "
                'factors, which mean another function with config.model.projection = "cola" '
                '(an activation stands between them); expected 0 (never), or projection "low_rank".'
            )
        if METHODS[self.method] is not None and self.model.scope == "none":
            raise TrainingError(
                f'config.method = {self.method!r} needs factors, but config.model.scope is "none"; '
                'expected "all", "attn" or "mlp" (or method "full").'
            )

    def _require(self, name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise TrainingError(_expected(name, expected, getattr(self, name)))

    @property
    def short_warmup(self) -> int:
        """A warm-up for a run of these steps: the share of them that it has in all our configs."""
        return self.steps // 10

    @property
    def model_config(self) -> LlamaConfig:
        """The network of this run: ``model`` with the projections of the method."""
        projection = METHODS[self.method]
        if projection is None:
            return self.model.dense()
        if self.method == "loro" and self.model.projection in LORO_PROJECTIONS:
            return self.model
        return dataclasses.replace(self.model, projection=projection)

    @property
    def refresh_choice(self) -> str | None:
        """``refresh`` as :func:`loro_jax.loro` wants it."""
        return None if self.refresh == "none" else self.refresh

    def to_json(self) -> str:
        """The resolved config, every field written out."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def differences(stored: dict[str, Any], config: Config) -> list[str]:
    """Fields whose values differ between a stored config and this one, as lines to print.

    Args:
        stored: a parsed ``config.json``.
        config: the config of the present command.

    Returns:
        One string a field: ``name: stored != given``; :data:`RESUMABLE_FIELDS` are passed over.
    """
    # A run of an earlier version lacks the fields that came later: it ran with their defaults.
    old = _flatten(json.loads(Config().to_json())) | _flatten(stored)
    new = _flatten(json.loads(config.to_json()))
    return [
        f"{name}: {old[name]!r} there, {new.get(name, '(absent)')!r} now"
        for name in sorted(old)
        if old[name] != new.get(name, "(absent)")
        and not any(name == free or name.startswith(f"{free}.") for free in RESUMABLE_FIELDS)
    ]


def field_names() -> list[str]:
    """All field names of a config, dotted, as they follow ``--config.``."""
    return list(_flatten(dataclasses.asdict(Config())))


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _expected(name: str, expected: str, value: object) -> str:
    return f"config.{name} must be {expected}, but is {value!r}."

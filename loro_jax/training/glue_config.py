"""The config of a run that trains a RoBERTa on a task of GLUE."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from loro_jax.fields import at_least, check, field, nested, one_of
from loro_jax.glue import TASKS, GlueConfig
from loro_jax.layers.adapters import ADAPTERS
from loro_jax.training import config as of_any
from loro_jax.training.adapter_checks import check_adapters
from loro_jax.training.config import AdapterConfig, Config
from loro_jax.training.methods import METHODS
from models.roberta import RobertaConfig

# Projections of a block that can have adapters, by the names of Hugging Face's modules.
TARGETS = {
    "query": "blocks/attention/query",
    "key": "blocks/attention/key",
    "value": "blocks/attention/value",
    "attention.output": "blocks/attention/output",
    "intermediate": "blocks/mlp/intermediate",
    "output": "blocks/mlp/output",
}
# Patterns of what adapters leave fixed, unless it is asked for.
REST = {
    "head": ("classifier",),
    "embedding": ("embeddings/word", "embeddings/position", "embeddings/token_type"),
    "norms": ("embeddings/norm", "blocks/*_norm"),
    "biases": ("**/bias",),
}


@dataclasses.dataclass(unsafe_hash=True)
class Encoder(RobertaConfig):
    """Architecture and precision of a RoBERTa, and the rank of methods on its dense projections."""

    rank: int = field(8, at_least(1), "rank of the subspaces of GaLore and the like")


@dataclasses.dataclass
class GlueAdapterConfig(AdapterConfig):
    """Adapters of a RoBERTa."""

    targets: str = field(
        "query,value",
        None,
        f"projections with adapters: all, or names with commas, of {', '.join(TARGETS)}",
    )
    trained: str = field(
        "head", None, f"what else is trained, with commas: {', '.join(REST)}; the head is new"
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the projections with adapters."""
        return tuple(TARGETS) if self.targets == "all" else tuple(self.targets.split(","))

    @property
    def also(self) -> tuple[str, ...]:
        """Patterns of what else is trained."""
        asked = self.trained.split(",") if self.trained else []
        return tuple(pattern for name in asked for pattern in REST[name])


@dataclasses.dataclass
class GlueRun(Config):
    """The config of a run on GLUE: fields that are not listed here are those of every run."""

    task: str = field("cola", one_of(TASKS), "the task of GLUE")
    epochs: int = field(
        0,
        at_least(0),
        "passes over the training rows, which then determine steps and, once a pass, eval_every "
        "and checkpoint_every; 0: as those fields say",
    )
    init_from: str | None = field(
        None,
        None,
        "a directory of a Hugging Face RoBERTa: the run uses its architecture and starts from its "
        "weights; none: new weights",
    )
    batch_size: int = field(16, at_least(1), "rows per optimizer step, on all devices")
    sequence_length: int = field(512, at_least(4), "most tokens of a row; longer ones are cut")
    model: Encoder = nested(Encoder, "architecture and precision")  # type: ignore[assignment]
    adapter: GlueAdapterConfig = nested(GlueAdapterConfig, "adapters")
    data: GlueConfig = nested(GlueConfig, "tables and tokenizer")  # type: ignore[assignment]

    def checks(self) -> Sequence[Callable[[Any], object]]:
        """Returns the checks of a config."""
        return _CHECKS


def _network(config: GlueRun) -> None:
    # The vocabulary may be left to the tokenizer, whose pad_id is then the model's.
    model = config.model
    if model.vocab_size == 0:
        model = dataclasses.replace(model, vocab_size=model.pad_id + 1)
    model.validate()
    if config.sequence_length > model.longest:
        raise ValueError(
            f"sequence_length = {config.sequence_length} is more than the {model.longest} tokens "
            "that the model has positions for."
        )


def _language_fields(config: GlueRun) -> None:
    if config.published_ppl:
        raise ValueError("published_ppl is for language models; expected false.")
    if config.distillation.teacher is not None:
        raise ValueError(
            f"distillation.teacher = {config.distillation.teacher!r} is for language models; "
            "expected none."
        )
    if config.init_optimizer != "fresh":
        raise ValueError(
            f"init_optimizer = {config.init_optimizer!r} is for language models; expected 'fresh'."
        )


def _adapters(config: GlueRun) -> None:
    adapter, method = config.adapter, METHODS[config.method]
    if not config.has_adapters:
        if method.projection is not None:
            raise ValueError(
                f"method = {config.method!r} trains factors, which a pretrained RoBERTa has only "
                "in adapters; expected config.adapter.kind to be one of "
                f"{', '.join(ADAPTERS)}, or a method of dense projections, such as full."
            )
        return
    if adapter.init_from is not None and config.init_from is None:
        raise ValueError(
            f"adapter.init_from = {adapter.init_from!r} needs its base in init_from, which is none."
        )
    hidden, wide = config.model.hidden_size, config.model.intermediate_size
    of_mlp = min(hidden, wide)
    sides = {name: of_mlp if "mlp" in path else hidden for name, path in TARGETS.items()}
    check_adapters(config, sides, REST)


def _fields(config: GlueRun) -> None:
    check(config)
    check(config.data, "data.")
    check(config.mesh, "mesh.")
    check(config.adapter, "adapter.")


_CHECKS: tuple[Callable[[Any], object], ...] = (
    _fields,
    *of_any.SHARED_CHECKS,
    _network,
    _language_fields,
    _adapters,
)

"""The config of an adapter in PEFT's format: what it says, and which projections it changes."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from models.config import LlamaConfig
from models.huggingface.errors import CheckpointError
from models.huggingface.fields import number, whole_number
from models.huggingface.files import read_json
from models.huggingface.names import PROJECTIONS, layer_prefix

CONFIG = "adapter_config.json"

# Forms of dW by PEFT's names.
LORA, ADALORA, RANDLORA, MISS = "LORA", "ADALORA", "RANDLORA", "MISS"
# Their ranks where a file has none.
_RANKS = {LORA: 8, RANDLORA: 32, MISS: 64}

# Fields that change the function in ways that are not read, if they are set at all.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Values of init_lora_weights that leave the base as it is; others subtract from its weights.
_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The config of an adapter.

    Attributes:
        path: path of the file.
        form: ``peft_type``.
        rank: ``r``; that of the start for AdaLoRA.
        alpha: ``lora_alpha`` or ``randlora_alpha``; 0 where there is none.
        base: name or path of the base, if the file has one.
        content: the whole file.
    """

    path: pathlib.Path
    form: str
    rank: int
    alpha: float
    base: str | None
    content: dict[str, Any]

    def rank_of(self, module: str) -> int:
        """Returns the rank of LoRA's factors of a module."""
        return int(self._pattern("rank_pattern", module, self.rank))

    def scale_of(self, module: str) -> float:
        """Returns the factor of LoRA's product of a module."""
        alpha, rank = self._pattern("alpha_pattern", module, self.alpha), self.rank_of(module)
        return alpha / (rank**0.5 if self.content.get("use_rslora") else rank)

    def _pattern(self, field: str, module: str, default: float) -> float:
        values = self.content.get(field) or {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path}: {field} = {values!r}; expected an object.")
        for pattern in values:
            if _matches(self.path, field, rf"(.*\.)?({pattern})", module):
                return number(values, pattern, f"{self.path}: {field}") or default
        return default

    def modules(self, config: LlamaConfig) -> list[str]:
        """Returns the names of the projections that it changes, in the order of the layers.

        Raises:
            CheckpointError: if it changes anything else, or nothing.
        """
        for other in ("lm_head", "model.embed_tokens"):
            if self.content.get("target_modules") != "all-linear" and self._adapts(other):
                raise CheckpointError(
                    f"{self.path}: target_modules names {other}; expected projections of the "
                    f"layers ({', '.join(map(_last, PROJECTIONS.values()))})."
                )
        found = self.adapted(projections(config))
        if not found:
            raise CheckpointError(
                f"{self.path}: target_modules = {self.content.get('target_modules')!r} matches no "
                f"projection of the base; expected names among "
                f"{', '.join(map(_last, PROJECTIONS.values()))}."
            )
        return found

    def adapted(self, candidates: Iterable[str]) -> list[str]:
        """Returns those of some modules that are targets, by the rules of PEFT."""
        return [module for module in candidates if self._adapts(module)]

    def _adapts(self, module: str) -> bool:
        """Returns whether a module is a target, by the rules of PEFT."""
        excluded, targets = self.content.get("exclude_modules"), self.content.get("target_modules")
        if excluded and self._named(excluded, "exclude_modules", module):
            return False
        if targets == "all-linear":
            return True
        if not self._named(targets, "target_modules", module):
            return False
        layers = self.content.get("layers_to_transform")
        if isinstance(targets, str) or layers is None or layers == []:
            return True
        patterns = self.content.get("layers_pattern") or [r"[^.]*"]
        patterns = [patterns] if isinstance(patterns, str) else patterns
        for pattern in patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match is not None:
                return int(match[1]) in (layers if isinstance(layers, list) else [layers])
        return False

    def _named(self, names: Any, field: str, module: str) -> bool:
        """Returns whether a regular expression or a list of names matches a module."""
        if isinstance(names, str):
            return _matches(self.path, field, names, module)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{self.path}: {field} = {names!r}; expected a list of names, a regular "
                "expression or 'all-linear'."
            )
        return any(module == name or module.endswith(f".{name}") for name in names)


def read_adapter_config(directory: pathlib.Path, saved: Sequence[str] = ()) -> PeftConfig:
    """Reads the config of an adapter in PEFT's format.

    Args:
        directory: directory with ``adapter_config.json``.
        saved: modules that may be stored whole beside the adapters.

    Raises:
        CheckpointError: if it is missing or damaged, or of a form that is not read.
    """
    path = directory / CONFIG
    content = read_json(path)
    form = content.get("peft_type")
    if form not in (LORA, ADALORA, RANDLORA, MISS):
        raise CheckpointError(
            f"{path}: peft_type = {form!r} is not read; expected {LORA}, {ADALORA}, {RANDLORA} or "
            f"{MISS}."
        )
    for name in _REFUSED:
        whole = content.get(name) if name == "modules_to_save" else None
        if isinstance(whole, list) and all(module in saved for module in whole):
            continue
        if content.get(name):
            raise CheckpointError(
                f"{path}: {name} = {content[name]!r} is not supported; expected an adapter of "
                "projections alone, without it."
            )
    if content.get("bias", "none") != "none":
        raise CheckpointError(f"{path}: bias = {content['bias']!r}; expected 'none'.")
    initialiser = content.get("init_lora_weights", True)
    if initialiser not in _INITIALISERS:
        raise CheckpointError(
            f"{path}: init_lora_weights = {initialiser!r} changes the base; expected an adapter "
            "that PEFT has converted to plain LoRA."
        )
    base = content.get("base_model_name_or_path")
    return PeftConfig(
        path,
        form,
        _rank(content, form, str(path)),
        _alpha(content, form, str(path)),
        base if isinstance(base, str) and base else None,
        content,
    )


def _rank(content: dict[str, Any], form: str, where: str) -> int:
    name, default = ("init_r", 12) if form == ADALORA else ("r", _RANKS[form])
    rank = whole_number(content, name, where)
    rank = default if rank is None else rank
    if rank < 1:
        raise CheckpointError(f"{where}: {name} = {rank}; expected at least 1.")
    return rank


def _alpha(content: dict[str, Any], form: str, where: str) -> float:
    if form == MISS:
        return 0.0
    name, default = ("randlora_alpha", 640.0) if form == RANDLORA else ("lora_alpha", 8.0)
    alpha = number(content, name, where)
    return default if alpha is None else float(alpha)


def note_of_base(config: PeftConfig, base: str) -> str | None:
    """Returns a note if an adapter names another base than the one in use; None if not.

    Args:
        config: the adapter's config.
        base: name or path of the base in use; only the last part of a path is compared.
    """
    if config.base is None or pathlib.Path(config.base).name == pathlib.Path(base).name:
        return None
    return f"note: {config.path} names the base {config.base!r}, used with {base!r}"


def projections(config: LlamaConfig) -> Iterator[str]:
    """Yields Hugging Face's names of a model's projections."""
    for layer in range(config.num_layers):
        for name in PROJECTIONS.values():
            yield f"{layer_prefix(layer)}{name}"


def place_of(module: str) -> tuple[int, tuple[str, str]]:
    """Returns the layer of a projection, and our module and attribute.

    Example:
        >>> place_of("model.layers.3.self_attn.q_proj")
        (3, ('attention', 'q'))
    """
    _, _, layer, name = module.split(".", 3)
    return int(layer), next(ours for ours, theirs in PROJECTIONS.items() if theirs == name)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches(path: pathlib.Path, field: str, pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(
            f"{path}: {field}: {pattern!r} is no regular expression ({error})."
        ) from None

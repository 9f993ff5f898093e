"""The table of the kinds of adapter: adding one takes one file and one entry here."""

from __future__ import annotations

from loro_jax.layers.adapters.adalora import AdaLora
from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.gated import Gated
from loro_jax.layers.adapters.increlora import IncreLora
from loro_jax.layers.adapters.lora import Lora

ADAPTERS: dict[str, type[Adapter]] = {
    "lora": Lora,
    "adalora": AdaLora,
    "increlora": IncreLora,
    "gated": Gated,
}

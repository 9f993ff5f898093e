"""The table of the kinds of adapter: adding one takes one file and one entry here."""

from __future__ import annotations

from loro_jax.layers.adapters.adalora import AdaLora
from loro_jax.layers.adapters.adapter import Adapter
from loro_jax.layers.adapters.bone import Bone
from loro_jax.layers.adapters.gated import Gated
from loro_jax.layers.adapters.increlora import IncreLora
from loro_jax.layers.adapters.lora import Lora
from loro_jax.layers.adapters.lora_sb import LoraSB
from loro_jax.layers.adapters.miss import Miss
from loro_jax.layers.adapters.randlora import RandLora
from loro_jax.layers.adapters.sltrain import Sltrain

ADAPTERS: dict[str, type[Adapter]] = {
    "lora": Lora,
    "lora_sb": LoraSB,
    "randlora": RandLora,
    "miss": Miss,
    "bone": Bone,
    "adalora": AdaLora,
    "increlora": IncreLora,
    "gated": Gated,
    "sltrain": Sltrain,
}

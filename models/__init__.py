"""Flax NNX networks with low-rank projections."""

from models.config import PRESETS, LlamaConfig, preset
from models.llama import Llama
from models.loss import Batch, cross_entropy, next_token_loss

__all__ = ["PRESETS", "Batch", "Llama", "LlamaConfig", "cross_entropy", "next_token_loss", "preset"]

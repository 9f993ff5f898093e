"""Floating-point operations of a training step, counted per token from the shapes of a model."""

from __future__ import annotations

from loro_jax.layers.adapters import ADAPTERS
from loro_jax.layers.projections import PROJECTIONS
from loro_jax.training.config import Config


def flops_per_token(config: Config) -> float:
    """Counts the operations of the forward and the backward pass, per token.

    Counts matrix products, with two operations per multiplication: projections, causal attention
    (half of the score matrix) and the head. Excludes norms, activations, the optimizer, and the
    recomputation of ``model.remat``.

    Args:
        config: the run's config.

    Returns:
        Operations per token.

    Example:
        >>> from models import LlamaConfig
        >>> config = Config(method="full", sequence_length=4, model=LlamaConfig(vocab_size=8,
        ...     hidden_size=4, intermediate_size=6, num_layers=1, num_heads=2, rank=2))
        >>> flops_per_token(config)  # 6 (4 4^2 + 3 4 6 + 8 4) + 6 4 4
        1104.0
    """
    model = config.model_config
    queries, L = model.num_heads * model.head_size, config.sequence_length
    tokens = config.batch_size * config.sequence_length / config.gradient_accumulation
    layer = 6.0 * L * queries  # scores and weighted values, 2 L D each forward, halved by the mask
    for group in ("attn", "mlp"):
        for name, (m, n) in model.shapes(group).items():
            spec = model.projection_spec(group, name)
            # Forward, and backward to the input and to the trained weights.
            if spec.rank is None:
                layer += (4.0 if config.has_adapters else 6.0) * m * n
            else:
                layer += PROJECTIONS[spec.kind].flops(m, n, spec, tokens)
    if config.has_adapters:
        # Their own weight is thin. Of the fixed head, the backward pass is to its input alone.
        shapes = model.shapes("attn") | model.shapes("mlp")
        for name in config.adapter.names:
            layer += ADAPTERS[config.adapter_kind].flops(*shapes[name], config.adapter.rank)
    trained_head = not config.has_adapters or {"head", "embedding"} & set(config.adapter.also)
    head = (6.0 if trained_head else 4.0) * model.vocab_size * model.hidden_size
    return model.num_layers * layer + head

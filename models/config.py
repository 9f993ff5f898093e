"""The config of a LLaMA, and named sizes.

``LlamaConfig.scope`` says which projections are low-rank; embedding and head are always dense.
Shapes: as in :mod:`models.llama`.
"""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses
import re

import jax.numpy as jnp

from loro_jax.fields import Range, above, at_least, between, check, field, nested, one_of
from loro_jax.layers.common import ProjectionSpec
from loro_jax.layers.projections import PROJECTIONS
from models.attention import ATTENTION
from models.rope import RopeScaling

GROUPS = ("attn", "mlp")
SCOPES = ("all", "attn", "mlp", "none")
REMAT_POLICIES = ("none", "full", "dots", "rank")
DTYPES = ("float32", "bfloat16", "float16", "float64")

_DENSITY = above(0, most=1)
_NAMED = ("xavier", "kaiming", "auto", "dlr", "orth", "xavorth", "lora")
_INITIALISERS = Range(
    lambda: f"one of {', '.join(_NAMED)}, randn_X, const_X with a number X",
    lambda name: name in _NAMED or bool(re.fullmatch("(randn|const)_.+", name)),
    listed=True,
)


# Hashable, because NNX stores it in the static structure of modules, which jit hashes; mutable,
# because command-line overrides set its fields. A model takes a private copy.
@dataclasses.dataclass(unsafe_hash=True)
class LlamaConfig:
    """Architecture and precision of a LLaMA."""

    vocab_size: int = field(32000, at_least(1), "rows of the embedding and of the head")
    hidden_size: int = field(512, at_least(1), "D")
    intermediate_size: int = field(1376, at_least(1), "F, width of the MLP")
    num_layers: int = field(
        8, at_least(1), "number of blocks; with config.init_from also 0: as many as there"
    )
    num_heads: int = field(8, at_least(1), "H, heads of queries")
    num_kv_heads: int | None = field(
        None,
        None,
        "heads of keys and values, each shared by H / num_kv_heads query heads (grouped-query "
        "attention); none: num_heads",
    )
    head_dim: int | None = field(
        None, None, "K, size of a head, even because of rotary pairs; none: D / H"
    )
    max_sequence_length: int = field(1024, at_least(1), "longest sequence that the model accepts")
    scope: str = field(
        "all",
        one_of(SCOPES),
        "which projections are low-rank: all, attn (q, k, v, o), mlp (gate, up, down) or none",
    )
    rank: int = field(128, None, "rank of the low-rank projections")
    attn_rank: int | None = field(None, None, "rank of q, k, v, o; none: rank")
    mlp_rank: int | None = field(None, None, "rank of gate, up, down; none: rank")
    ranks: str = field(
        "",
        None,
        "ranks of single projections, such as q=64,k=32,down=0 (0: dense); the others have those "
        "of their groups",
    )
    projection: str = field(
        "low_rank",
        one_of(PROJECTIONS),
        "kind of the low-rank projections, unless the training method has its own; loro also "
        "trains scaffold, sltrain (sparse entries like all other leaves) and, without exact steps, "
        "cola, lost and scaffold_cola",
    )
    scaffold_scale: float = field(
        1.0, at_least(0), "norm of scaffold's fixed matrix, relative to a dense initialisation"
    )
    scaffold_block: int = field(
        32, at_least(0), "smallest side of the blocks of scaffold's fixed matrix; 0: one block"
    )
    cross_layer: float = field(
        0.0,
        at_least(0),
        "projections with a rank add the output of the same projection one layer below, times a "
        "trained number that starts at this value; 0: none",
    )
    alpha: float = field(
        32.0, None, "the product of the factors is scaled by alpha / rank (lora, sltrain)"
    )
    density: float = field(
        0.03, _DENSITY, "fraction of nonzero entries in the sparse matrices of sltrain"
    )
    lost_gamma: float = field(
        0.7,
        between(0, 1),
        "weight of the factors' term in lost; that of the dense columns is 1 minus it",
    )
    lost_channels: float = field(
        0.01, _DENSITY, "fraction of the inputs of lost that have a dense column"
    )
    initialiser: str = field("xavier", _INITIALISERS, "how factors are drawn")
    initializer_range: float = field(
        0.02, None, "standard deviation of embedding, head and dense projections"
    )
    rms_norm_eps: float = field(1e-6, None, "epsilon of the norms")
    rope_theta: float = field(10000.0, None, "base of the rotary frequencies")
    rope_scaling: RopeScaling = nested(
        RopeScaling, "scaling of the rotary frequencies; none, unless a checkpoint has one"
    )
    tie_embeddings: bool = field(False, None, "share the embedding matrix with the head")
    dtype: str = field(
        "float32",
        one_of(DTYPES),
        "dtype of activations and products (norms, attention weights and loss reduce in float32)",
    )
    param_dtype: str = field("float32", one_of(DTYPES), "dtype of the stored parameters")
    remat: str = field(
        "dots",
        one_of(REMAT_POLICIES),
        "rematerialisation in the backward pass: dots (recompute everything except products with "
        "weights: storing elementwise results costs more than recomputing them), none, full "
        "(recompute each block from its input) or rank (keep the r entries per token between two "
        "factors, recompute everything else)",
    )
    attention: str = field(
        "auto",
        one_of(ATTENTION),
        "auto (cudnn where it runs, else blocks), blocks (of queries, with the keys they attend "
        "to), whole (one score matrix) or cudnn (kernel for NVIDIA GPUs, 16-bit activations)",
    )
    unroll: int = field(1, at_least(1), "layers per iteration of the compiled loop over layers")
    loss_chunk_size: int = field(
        4096, at_least(1), "tokens whose logits are in memory at a time in the loss"
    )

    def validate(self) -> None:
        """Raises ValueError for an invalid field; it names field, value and expectation."""
        check(self, "model.")
        self._check_heads()
        self._check_ranks()

    def _check_heads(self) -> None:
        if self.attention == "cudnn" and self.dtype not in ("bfloat16", "float16"):
            raise ValueError(
                "model.attention = 'cudnn' needs model.dtype bfloat16 or float16, but it is "
                f"{self.dtype!r}."
            )
        if self.head_dim is None and (self.hidden_size % self.num_heads or self.head_size % 2):
            raise ValueError(
                f"model.num_heads = {self.num_heads} must divide model.hidden_size = "
                f"{self.hidden_size} into heads of an even size (rotary embeddings turn pairs)."
            )
        if self.head_size < 2 or self.head_size % 2:
            raise ValueError(
                "model.head_dim must be even (rotary embeddings turn pairs), but is "
                f"{self.head_dim}."
            )
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise ValueError(
                f"model.num_kv_heads = {self.num_kv_heads} must divide model.num_heads = "
                f"{self.num_heads}."
            )
        self.rope_scaling.validate()

    def _check_ranks(self) -> None:
        named = self._named_ranks()
        self._check_named_ranks(named)
        below = PROJECTIONS[self.projection].below_full_rank
        for group in GROUPS:
            rest = [min(shape) for name, shape in self.shapes(group).items() if name not in named]
            if not rest:
                continue
            rank, limit = self.group_rank(group), min(rest) - below
            if rank is not None and not 1 <= rank <= limit:
                found = "one less than the smaller" if below else "the smaller"
                raise ValueError(
                    f"model.{group}_rank (or model.rank) must be between 1 and {limit}, {found} "
                    f"side of its projections, but is {rank}."
                )

    def _check_named_ranks(self, named: dict[str, int]) -> None:
        shapes = self.shapes("attn") | self.shapes("mlp")
        for name, rank in named.items():
            if name not in shapes or not 0 <= rank <= min(shapes[name]):
                limit = f" from 0 to {min(shapes[name])}" if name in shapes else ""
                raise ValueError(
                    f"model.ranks must be NAME=RANK,... with names among {', '.join(shapes)} and "
                    f"ranks up to the smaller side{limit}, but is {self.ranks!r}."
                )
        if self.ranks and self.cross_layer:
            raise ValueError(
                f"model.ranks = {self.ranks!r} has no outputs that cross layers; expected "
                f"model.cross_layer = 0, but it is {self.cross_layer}."
            )

    def _named_ranks(self) -> dict[str, int]:
        """Parses ``ranks``; what is no rank is -1, which validation refuses."""
        pairs = (one.partition("=") for one in self.ranks.split(",") if self.ranks)
        return {
            name.strip(): int(rank) if rank.strip().isdecimal() else -1 for name, _, rank in pairs
        }

    @property
    def head_size(self) -> int:
        """Size of a head, K."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def shapes(self, group: str) -> dict[str, tuple[int, int]]:
        """Returns (outputs, inputs) of each projection of "attn" or "mlp", by name."""
        D, F = self.hidden_size, self.intermediate_size
        if group == "mlp":
            return {"gate": (F, D), "up": (F, D), "down": (D, F)}
        queries, keys = self.num_heads * self.head_size, self.kv_heads * self.head_size
        return {"q": (queries, D), "k": (keys, D), "v": (keys, D), "o": (D, queries)}

    def group_rank(self, group: str) -> int | None:
        """Returns the rank of the projections of "attn" or "mlp"; None if they are dense."""
        if self.scope not in ("all", group):
            return None
        own = self.attn_rank if group == "attn" else self.mlp_rank
        return self.rank if own is None else own

    def projection_rank(self, name: str) -> int | None:
        """Returns the rank of a projection, such as "q" or "down"; None if it is dense.

        Example:
            >>> config = LlamaConfig(rank=8, ranks="k=4,down=0")
            >>> [config.projection_rank(name) for name in ("q", "k", "down")]
            [8, 4, None]
        """
        rank = self.group_rank("attn" if name in self.shapes("attn") else "mlp")
        if rank is None:
            return None
        return self._named_ranks().get(name, rank) or None

    def projection_spec(self, group: str, name: str | None = None) -> ProjectionSpec:
        """Returns the specification of the projections of "attn" or "mlp", or of one of them."""
        return ProjectionSpec(
            kind=self.projection,
            rank=self.group_rank(group) if name is None else self.projection_rank(name),
            initialiser=self.initialiser,
            initializer_range=self.initializer_range,
            alpha=self.alpha,
            density=self.density,
            lost_gamma=self.lost_gamma,
            lost_channels=self.lost_channels,
            scaffold_scale=self.scaffold_scale,
            scaffold_block=self.scaffold_block,
            dtype=jnp.dtype(self.dtype),
            param_dtype=jnp.dtype(self.param_dtype),
        )

    def dense(self) -> "LlamaConfig":
        """Returns the same architecture with dense projections."""
        return dataclasses.replace(self, scope="none", ranks="")


def _sizes(hidden: int, intermediate: int, heads: int, layers: int, vocab: int = 32000) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_heads": heads,
        "num_layers": layers,
        "vocab_size": vocab,
    }


PRESETS: dict[str, LlamaConfig] = {
    # As small as tests and a first look need, with rows for the 259 ids of the bytes tokenizer.
    "tiny": LlamaConfig(**_sizes(32, 48, 4, 2, vocab=260), rank=8),
    # The paper's Table 7, which swaps two columns of 1B: the model has 24 layers and 32 heads.
    "60m": LlamaConfig(**_sizes(512, 1376, 8, 8), rank=128),
    "130m": LlamaConfig(**_sizes(768, 2048, 12, 12), rank=256),
    "350m": LlamaConfig(**_sizes(1024, 2736, 16, 24), rank=256),
    "1b": LlamaConfig(**_sizes(2048, 5461, 32, 24), rank=512),
    "7b": LlamaConfig(**_sizes(4096, 11008, 32, 32), rank=1024, max_sequence_length=2048),
    # Dense models with the low-rank models' parameter counts. Sizes of Shallow and Slim are from
    # the model files in the authors' repository (60m_slim: GaLore's llama_40m).
    "60m_shallow": LlamaConfig(**_sizes(480, 1400, 8, 4), scope="none"),
    "60m_slim": LlamaConfig(**_sizes(416, 1024, 8, 8), scope="none"),
    "130m_shallow": LlamaConfig(**_sizes(820, 1720, 10, 6, vocab=32100), scope="none"),
    "130m_slim": LlamaConfig(**_sizes(640, 1450, 10, 12, vocab=32100), scope="none"),
    "350m_shallow": LlamaConfig(**_sizes(1024, 1880, 16, 12), scope="none"),
    "350m_slim": LlamaConfig(**_sizes(736, 1640, 16, 24), scope="none"),
    "1b_shallow": LlamaConfig(**_sizes(1984, 4115, 32, 12), scope="none"),
    "1b_slim": LlamaConfig(**_sizes(1408, 3250, 32, 24), scope="none"),
    # Slim-MLP: full attention and a narrow MLP. The authors' repository has no such file; these
    # widths match the low-rank models' parameter counts.
    "60m_slim_mlp": LlamaConfig(**_sizes(512, 131, 8, 8), scope="none"),
    "130m_slim_mlp": LlamaConfig(**_sizes(768, 598, 12, 12), scope="none"),
    "350m_slim_mlp": LlamaConfig(**_sizes(1024, 258, 16, 24), scope="none"),
    "1b_slim_mlp": LlamaConfig(**_sizes(2048, 512, 32, 24), scope="none"),
}


def preset(name: str, **changes: object) -> LlamaConfig:
    """Returns a named config with some fields changed.

    Args:
        name: a key of :data:`PRESETS`.
        **changes: fields of :class:`LlamaConfig` to set.

    Returns:
        A new config.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> preset("60m", rank=64).rank
        64
    """
    if name not in PRESETS:
        raise ValueError(f"preset: unknown model {name!r}; expected one of {', '.join(PRESETS)}.")
    made = dataclasses.replace(PRESETS[name], **changes)  # type: ignore[arg-type]
    # Overrides set fields of this one too, and must not reach the preset.
    return dataclasses.replace(made, rope_scaling=dataclasses.replace(made.rope_scaling))

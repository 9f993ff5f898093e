"""The low-rank pair: a weight matrix stored as the product W = B A of two thin factors."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from loro_jax.linalg.batching import one_by_one
from loro_jax.linalg.precision import at_least_float32, inexact

Array = jax.Array


@jax.tree_util.register_pytree_with_keys_class
class LowRank:
    """A matrix W = B A of rank r, stored as its factors.

    W maps input to output (``y = W x``): ``B`` is the output side, ``A`` the input side, as in
    LoRA. Leading axes are batch axes (such as the layers of a scanned model). ``LowRank`` is a
    pytree node with the children ``B`` and ``A``: it may be anywhere in a parameter tree, where
    :func:`loro_jax.loro` finds it. Its children may also be placeholders for arrays, such as
    partition specs, axes of ``jax.vmap``, or labels.

    Attributes:
        B: array of shape (..., m, r).
        A: array of shape (..., r, n).

    Raises:
        ValueError: if the shapes are not those of factors of a matrix of rank r <= min(m, n).

    Example:
        >>> import jax.numpy as jnp
        >>> pair = LowRank(jnp.ones((6, 2)), jnp.ones((2, 4)))
        >>> pair.shape, pair.rank
        ((6, 4), 2)
        >>> pair.apply(jnp.ones((3, 4))).shape
        (3, 6)
    """

    def __init__(self, B: Array, A: Array):
        # Specs, axes and labels have no shape.
        if hasattr(B, "shape") and hasattr(A, "shape"):
            check_factors(B, A, "LowRank")
        self.B = B
        self.A = A

    @property
    def rank(self) -> int:
        """The rank r, the inner dimension."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (..., m, n) of the product."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    def product(self) -> Array:
        """Returns W = B A, (..., m, n). Meant for checks: it is as large as a dense weight."""
        return self.B @ self.A

    def apply(self, x: Array) -> Array:
        """Computes ``W x`` for x of shape (..., n) by the factors, as ``(x A^T) B^T``.

        With leading axes, x is one vector for all matrices, (n,), or has vectors for each, (..., k,
        n), where the leading axes broadcast.
        """
        if x.ndim == 1 and self.A.ndim > 2:
            return self.apply(x[None, :])[..., 0, :]
        return (x @ self.A.mT) @ self.B.mT

    def balance(self) -> LowRank:
        """Balances the factors (``B^T B = A A^T``); see :func:`balance`."""
        return LowRank(*balance(self.B, self.A))

    @classmethod
    def from_dense(cls, W: Array, rank: int) -> LowRank:
        """Returns the best rank-r approximation of W, balanced, see :func:`from_dense`."""
        return cls(*from_dense(W, rank))

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, Any], None]:
        """Returns the children with their path keys, for ``jax.tree_util``."""
        key = jax.tree_util.GetAttrKey
        return ((key("B"), self.B), (key("A"), self.A)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, Any]) -> LowRank:
        """Rebuilds the node. Children may be placeholders (specs, None), so none is checked."""
        pair = object.__new__(cls)
        pair.B, pair.A = children
        return pair

    def __repr__(self) -> str:
        return f"LowRank(B={self.B!r}, A={self.A!r})"


def check_factors(B: Array, A: Array, where: str) -> None:
    """Raises ValueError unless B (..., m, r) and A (..., r, n) match and r <= min(m, n).

    Args:
        B: output-side factor (or anything with a ``shape``).
        A: input-side factor.
        where: name of the pair in the message.
    """
    found = f"B has shape {tuple(B.shape)} and A has shape {tuple(A.shape)}"
    if len(B.shape) < 2 or len(A.shape) < 2:
        raise ValueError(f"{where}: expected B (..., m, r) and A (..., r, n), but {found}.")
    if B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(
            f"{where}: expected B (..., m, r) and A (..., r, n) with the same r and the same "
            f"leading axes, but {found}."
        )
    m, r, n = B.shape[-2], A.shape[-2], A.shape[-1]
    if not 1 <= r <= min(m, n):
        raise ValueError(
            f"{where}: the rank must be between 1 and min(m, n) = {min(m, n)}, but is {r} "
            f"({found})."
        )


def rank_ratio(B: Array, A: Array) -> float:
    """Returns ``r / min(m, n)`` of a pair: the factor of approximate steps (equation 11)."""
    return A.shape[-2] / min(B.shape[-2], A.shape[-1])


def check_real(B: Array, A: Array, where: str) -> None:
    """Raises ValueError unless both factors have a real floating-point dtype."""
    for name, factor in (("B", B), ("A", A)):
        if not jnp.issubdtype(factor.dtype, jnp.floating):
            raise ValueError(
                f"{where}: expected real floating-point factors, but {name} is {factor.dtype}."
            )


def from_dense(W: Array, rank: int) -> tuple[Array, Array]:
    """Computes balanced factors of W by its truncated SVD.

    With ``W = U S V^T``, the factors are ``B = U_r S_r^(1/2)`` and ``A = S_r^(1/2) V_r^T``: their
    product is the best rank-r approximation of W (Eckart-Young), and both have the singular
    values ``S_r^(1/2)``.

    Args:
        W: array of shape (..., m, n); leading axes are batch axes.
        rank: r, between 1 and min(m, n).

    Returns:
        B (..., m, r) and A (..., r, n) in the dtype of W, or float32 for integers; the SVD is
        computed in float32 or wider.

    Raises:
        ValueError: if the rank is not between 1 and min(m, n).

    Example:
        >>> import jax.numpy as jnp
        >>> B, A = from_dense(jnp.diag(jnp.array([4.0, 1.0, 0.0])), rank=2)
        >>> bool(jnp.allclose(B @ A, jnp.diag(jnp.array([4.0, 1.0, 0.0])), atol=1e-6))
        True
    """
    if W.ndim < 2 or not 1 <= rank <= min(W.shape[-2:]):
        raise ValueError(
            f"from_dense: rank {rank} does not fit a matrix of shape {tuple(W.shape)}; "
            "expected 1 <= rank <= min(m, n)."
        )

    def factorise(W: Array) -> tuple[Array, Array]:
        U, s, Vt = jnp.linalg.svd(W, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return U[:, :rank] * root[None, :], root[:, None] * Vt[:rank]

    W = jnp.asarray(W)
    # One matrix at a time on CPU, where batched LAPACK calls can block each other for ever.
    B, A = one_by_one(factorise, W.ndim - 2)(W.astype(at_least_float32(W.dtype)))
    return B.astype(inexact(W.dtype)), A.astype(inexact(W.dtype))


def balance(B: Array, A: Array) -> tuple[Array, Array]:
    """Balances factors without changing their product: ``B'^T B' = A' A'^T``, diagonal.

    Args:
        B: array of shape (..., m, r).
        A: array of shape (..., r, n).

    Returns:
        B' and A' of the same shapes and dtypes (float32 for integers). The singular values of both
        are the square roots of W's.
    """
    check_factors(B, A, "balance")
    B, A = jnp.asarray(B), jnp.asarray(A)
    dtype = at_least_float32(jnp.promote_types(B.dtype, A.dtype))

    def rotate(B: Array, A: Array) -> tuple[Array, Array]:
        # The SVD of W = Q_b (R_b R_a^T) Q_a^T from that of the r x r core.
        Qb, Rb = jnp.linalg.qr(B)
        Qa, Ra = jnp.linalg.qr(A.T)
        U, s, Vt = jnp.linalg.svd(Rb @ Ra.T)
        root = jnp.sqrt(s)
        return (Qb @ U) * root[None, :], root[:, None] * (Vt @ Qa.T)

    # One matrix at a time on CPU, as in `from_dense`.
    B_new, A_new = one_by_one(rotate, B.ndim - 2)(B.astype(dtype), A.astype(dtype))
    return B_new.astype(inexact(B.dtype)), A_new.astype(inexact(A.dtype))


def initialise(
    key: Array,
    out_features: int,
    in_features: int,
    rank: int,
    method: str = "xavier",
    initializer_range: float | Array = 0.02,
) -> tuple[Array, Array]:
    """Initialises the factors of a pair; methods have the authors' names.

    Entries are normal, with these standard deviations for B (m x r) and A (r x n):

    ========== ============================= ============================= ==================
    name       B                             A                             note
    ========== ============================= ============================= ==================
    xavier     sqrt(2 / (m + r))             sqrt(2 / (r + n))             the paper's runs
    kaiming    sqrt(2 / r)                   sqrt(2 / r)                   fan-in of torch
    auto       (s^2 / r)^(1/4)               (s^2 / r)^(1/4)               W's entries: std s
    dlr        auto, plus R / sqrt(K)        (s^2 / r)^(1/4)               then scaled
    orth       orthonormal columns           orthonormal rows
    xavorth    orth times the std of xavier  orth times the std of xavier
    randn_X    X                             X                             X a number
    const_X    all entries X                 all entries X                 rank one: no LORO
    lora       zero                          uniform, 1 / sqrt(n) at most  rank zero: no LORO
    ========== ============================= ============================= ==================

    s is ``initializer_range``. R is ``K = ceil(m / r)`` identities on top of each other (DLR, arXiv
    2606.28932, whose fixed path from latents to outputs is part of B here); both factors of dlr are
    then scaled so that W's entries have the standard deviation s.

    Args:
        key: JAX random key.
        out_features: m.
        in_features: n.
        rank: r, between 1 and min(m, n).
        method: a name of the table.
        initializer_range: s, the standard deviation of a dense weight.

    Returns:
        B (m, r) and A (r, n) in float32.

    Raises:
        ValueError: if the rank is not between 1 and min(m, n), or the name is unknown.

    Example:
        >>> import jax
        >>> B, A = initialise(jax.random.key(0), 64, 32, rank=8)
        >>> B.shape, A.shape
        ((64, 8), (8, 32))
    """
    m, n, r = out_features, in_features, rank
    if not 1 <= r <= min(m, n):
        raise ValueError(
            f"initialise: the rank must be between 1 and min(m, n) = {min(m, n)} for a projection "
            f"of {n} inputs to {m} outputs, but is {r}."
        )
    xavier_B, xavier_A = math.sqrt(2 / (m + r)), math.sqrt(2 / (r + n))
    # An entry of B A sums r products: its variance is r std_B^2 std_A^2, here s^2.
    auto = (initializer_range**2 / r) ** 0.25
    scales = {
        "xavier": (xavier_B, xavier_A),
        "kaiming": (math.sqrt(2 / r), math.sqrt(2 / r)),
        "auto": (auto, auto),
        "dlr": (auto, auto),
        "orth": (1.0, 1.0),
        "xavorth": (xavier_B, xavier_A),
    }
    if method == "lora":
        bound = n**-0.5  # PyTorch's default for a linear layer with n inputs
        A = jax.random.uniform(key, (r, n), jnp.float32, -bound, bound)
        return jnp.zeros((m, r), jnp.float32), A
    scale_B: float | Array
    scale_A: float | Array
    name, _, number = method.partition("_")
    if name in ("randn", "const") and _is_number(number):
        scale_B = scale_A = float(number)
    elif method in scales:
        scale_B, scale_A = scales[method]
    else:
        raise ValueError(
            f"initialise: unknown method {method!r}; expected one of {', '.join(scales)}, "
            "lora, randn_X or const_X with a number X."
        )
    if name == "const":
        return jnp.full((m, r), scale_B, jnp.float32), jnp.full((r, n), scale_A, jnp.float32)
    # The authors' code discards the orthogonal matrices if its weights are bfloat16; here both
    # methods do what their names say.
    orthonormal = method in ("orth", "xavorth")
    draw = jax.nn.initializers.orthogonal() if orthonormal else jax.nn.initializers.normal(1.0)
    key_B, key_A = jax.random.split(key)
    B, A = draw(key_B, (m, r), jnp.float32), draw(key_A, (r, n), jnp.float32)
    B, A = (scale_B * B).astype(jnp.float32), (scale_A * A).astype(jnp.float32)
    return (B, A) if method != "dlr" else _with_repeated_identity(B, A, initializer_range)


def _with_repeated_identity(B: Array, A: Array, std: float | Array) -> tuple[Array, Array]:
    """Adds R / sqrt(K) to B, and scales both so that entries of B A have this deviation."""
    m, r = B.shape
    copies = -(-m // r)
    R = jnp.tile(jnp.eye(r, dtype=jnp.float32), (copies, 1))[:m]
    B = B + R / math.sqrt(copies)
    # Of an entry of B A: that of auto, and that of an entry of A / sqrt(K), which is independent.
    variance = std**2 + std / math.sqrt(r) / copies
    scale = (std**2 / variance) ** 0.25
    return (scale * B).astype(jnp.float32), (scale * A).astype(jnp.float32)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _register_with_flax() -> None:
    """Registers LowRank with ``flax.serialization``, in the form of a dict of B and A."""
    try:
        from flax import serialization
    except Exception:  # Flax is optional, and may not support this version of JAX
        return

    def from_state_dict(pair: LowRank, state: dict[str, Any]) -> LowRank:
        missing = {"B", "A"} - set(state)
        if missing:
            raise ValueError(
                f"LowRank: expected a state dict with B and A, but found {sorted(state)}."
            )
        restored = {
            name: serialization.from_state_dict(getattr(pair, name), state[name], name=name)
            for name in ("B", "A")
        }
        # Unchecked, because what is restored may be a placeholder.
        return LowRank.tree_unflatten(None, (restored["B"], restored["A"]))

    serialization.register_serialization_state(
        LowRank,
        lambda pair: {name: serialization.to_state_dict(getattr(pair, name)) for name in "BA"},
        from_state_dict,
        override=True,
    )


_register_with_flax()

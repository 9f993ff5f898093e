"""Attention in blocks of queries: the softmax's definition, in float64, whatever the length."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention
from models.layout import laid_out_on

causal_attention = jax.jit(attention.causal_attention, static_argnums=3)


def draw(length, heads=4, groups=4, head_size=8, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = [(2, length, n, head_size) for n in (heads, groups, groups)]
    return [
        jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


@jax.jit
def defined(q, k, v):
    """The definition, with all scores."""
    repeat, length = q.shape[2] // k.shape[2], q.shape[1]
    k, v = jnp.repeat(k, repeat, axis=2), jnp.repeat(v, repeat, axis=2)
    score = jnp.einsum("bqhk,bthk->bhqt", q, k) / np.sqrt(q.shape[-1])
    score = jnp.where(np.tri(length, dtype=bool), score, -jnp.inf)
    return jnp.einsum("bhqt,bthk->bqhk", jax.nn.softmax(score, axis=-1), v)


@pytest.mark.parametrize("method", ["blocks", "whole"])
@pytest.mark.parametrize(("length", "groups"), [(1, 4), (5, 2), (128, 4), (129, 1), (300, 2)])
def test_it_is_its_definition(x64, method, length, groups):
    q, k, v = draw(length, groups=groups)
    # JAX's own sums scores in float32, whatever the operands.
    tolerance = 1e-12 if method == "blocks" else 1e-5
    found = causal_attention(q, k, v, method)
    np.testing.assert_allclose(found, defined(q, k, v), atol=tolerance)


@pytest.mark.parametrize(("length", "groups"), [(130, 4), (300, 2)])
def test_gradients_are_those_of_one_square(length, groups):
    q, k, v = draw(length, groups=groups, dtype=jnp.float32)
    up = jax.random.normal(jax.random.key(9), q.shape)

    def gradients(method):
        loss = lambda *qkv: jnp.sum(up * causal_attention(*qkv, method))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for found, expected in zip(gradients("blocks"), gradients("whole"), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_more_positions_than_sixteen_small_blocks_make_larger_ones():
    q, k, v = draw(2100, heads=1, groups=1, dtype=jnp.float32)
    expected = causal_attention(q, k, v, "whole")
    np.testing.assert_allclose(causal_attention(q, k, v), expected, atol=1e-5)
    assert str(jax.make_jaxpr(attention.causal_attention)(q, k, v)).count(" dot_general[") == 2 * 9


def test_large_scores_overflow_nowhere():
    q, k, v = draw(200, dtype=jnp.float32)
    found = causal_attention(1e3 * q, 1e3 * k, v)
    np.testing.assert_allclose(found, causal_attention(1e3 * q, 1e3 * k, v, "whole"), rtol=1e-3)


def test_bfloat16_is_summed_in_float32():
    exact = causal_attention(*draw(300, dtype=jnp.float32))
    found = causal_attention(*draw(300, dtype=jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(found - exact))) < 0.03


@pytest.mark.parametrize(("length", "share"), [(256, 0.8), (1024, 0.6)])
def test_less_than_the_square_is_computed(length, share):
    def flops(method):
        qkv = draw(length, head_size=64, dtype=jnp.float32)
        compiled = causal_attention.lower(*qkv, method).compile()
        return compiled.cost_analysis()["flops"]

    assert flops("blocks") < share * flops("whole")


def test_cudnn_where_there_is_none_is_an_error_that_names_the_field():
    if jax.default_backend() == "gpu":
        pytest.skip("there may be one")
    with pytest.raises(ValueError, match=r"model\.attention = 'cudnn' needs an NVIDIA GPU"):
        attention.causal_attention(*draw(8, dtype=jnp.float32), "cudnn")


@pytest.mark.parametrize(
    ("capability", "dtype", "head_size", "expected"),
    [
        ((9, 0), jnp.bfloat16, 64, "cudnn"),
        ((9, 0), jnp.float16, 256, "cudnn"),
        ((8, 0), jnp.bfloat16, 128, "cudnn"),
        ((8, 0), jnp.bfloat16, 256, "blocks"),
        ((7, 5), jnp.float16, 64, "blocks"),  # before Ampere
        ((9, 0), jnp.float32, 64, "blocks"),
        ((9, 0), jnp.bfloat16, 12, "blocks"),
        ((), jnp.bfloat16, 64, "blocks"),  # no NVIDIA GPU
    ],
)
def test_cudnn_is_chosen_where_it_runs(monkeypatch, capability, dtype, head_size, expected):
    monkeypatch.setattr(attention, "_compute_capability", lambda: capability)
    assert attention.fastest_method(dtype, head_size) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("9.0", "cudnn"), ("7.5", "blocks"), ("gfx90a", "blocks")],  # the last is AMD's
)
def test_the_method_is_chosen_for_the_mesh_and_not_for_the_default_device(capability, expected):
    class Gpu(NamedTuple):
        platform: str = "gpu"
        compute_capability: str = capability

    class Mesh(NamedTuple):
        shape: dict[str, int]
        devices: np.ndarray

    devices = np.empty((1, 1, 1), object)
    devices[0, 0, 0] = Gpu()
    with laid_out_on(Mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices)):
        assert attention.fastest_method(jnp.bfloat16, 64) == expected
    if jax.default_backend() == "cpu":
        assert attention.fastest_method(jnp.bfloat16, 64) == "blocks"


def test_by_default_attention_takes_the_fastest_method(monkeypatch):
    q, k, v = draw(140, dtype=jnp.float32)
    blocks = attention.causal_attention(q, k, v, "blocks")
    np.testing.assert_array_equal(attention.causal_attention(q, k, v), blocks)
    monkeypatch.setattr(attention, "fastest_method", lambda *_: "whole")
    whole = attention.causal_attention(q, k, v, "whole")
    np.testing.assert_array_equal(attention.causal_attention(q, k, v), whole)
    assert not np.array_equal(whole, blocks)

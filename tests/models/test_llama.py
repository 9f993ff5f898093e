import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax import find_pairs
from loro_jax.memory import count_parameters
from models import PRESETS, Batch, Llama, cross_entropy, next_token_loss, preset
from models.rope import RopeScaling

TINY = preset("tiny", vocab_size=61, num_layers=3, max_sequence_length=16)


def make(config, seed=0):
    graphdef, params = nnx.split(Llama(config, nnx.Rngs(seed)), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def make_batch(config, rows=4, length=16, seed=0):
    tokens = np.random.default_rng(seed).integers(config.vocab_size, size=(rows, length + 1))
    mask = np.ones((rows, length), np.float32)
    mask[-1, length // 2 :] = 0
    return Batch(jnp.array(tokens[:, :-1]), jnp.array(tokens[:, 1:]), jnp.array(mask))


def parameters(config):
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return count_parameters(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("name", "dense", "rank", "low_rank"),
    [
        ("60m", 58, 128, 43),
        ("130m", 134, 256, 94),
        ("350m", 368, 256, 185),
        ("1b", 1339, 512, 609),
    ],
)
def test_parameter_counts_are_the_papers(name, dense, rank, low_rank):
    config = preset(name)
    assert config.rank == rank
    assert round(parameters(config) / 1e6) == low_rank
    assert round(parameters(config.dense()) / 1e6) == dense


def test_7b_has_the_size_of_llama_7b():
    assert parameters(preset("7b").dense()) == 6_738_415_616


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1b"])
@pytest.mark.parametrize("shape", ["shallow", "slim", "slim_mlp"])
def test_the_dense_rivals_have_the_low_rank_models_size(size, shape):
    ratio = parameters(preset(f"{size}_{shape}")) / parameters(preset(size))
    assert 0.99 < ratio < 1.01


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid(name):
    preset(name).validate()


def test_a_change_of_a_preset_reaches_no_other():
    preset("tiny").rope_scaling.factor = 7.0
    assert preset("tiny").rope_scaling.factor != 7.0


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="unknown model '61m'"):
        preset("61m")


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("all", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("attn", {"q", "k", "v", "o"}),
        ("mlp", {"gate", "up", "down"}),
        ("none", set()),
    ],
)
def test_scopes(scope, expected):
    _, params = make(dataclasses.replace(TINY, scope=scope))
    assert {pair.name.rsplit("/", 1)[1] for pair in find_pairs(params)} == expected


def test_each_group_has_its_own_rank():
    _, params = make(dataclasses.replace(TINY, attn_rank=4, mlp_rank=16))
    assert params["blocks"]["attention"]["q"]["A"].shape == (3, 4, 32)
    assert params["blocks"]["mlp"]["down"]["B"].shape == (3, 32, 16)


def test_layers_and_projections_start_different():
    _, params = make(TINY)
    q, k = (params["blocks"]["attention"][name]["B"] for name in "qk")
    assert not np.allclose(q[0], q[1])
    assert not np.allclose(q[0], k[0])
    assert not np.allclose(params["embedding"], params["head"]["W"])


def test_a_low_rank_model_computes_what_its_merged_dense_twin_does(x64):
    config = dataclasses.replace(TINY, dtype="float64", param_dtype="float64")
    graphdef, params = make(config)
    dense_graphdef, _ = make(config.dense())
    is_pair = lambda node: isinstance(node, dict) and set(node) == {"A", "B"}  # noqa: E731
    merged = jax.tree.map(
        lambda node: {"W": node["B"] @ node["A"]} if is_pair(node) else node,
        params,
        is_leaf=is_pair,
    )
    tokens = make_batch(config).inputs
    np.testing.assert_allclose(
        nnx.merge(graphdef, params)(tokens),
        nnx.merge(dense_graphdef, merged)(tokens),
        atol=1e-10,
    )


def test_attention_is_causal():
    graphdef, params = make(TINY)
    model = nnx.merge(graphdef, params)
    tokens = make_batch(TINY).inputs
    changed = tokens.at[:, 9].set((tokens[:, 9] + 1) % TINY.vocab_size)
    before, after = model(tokens), model(changed)
    np.testing.assert_allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not np.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64, 1000])
def test_chunked_loss_and_gradient_are_those_of_all_logits(x64, chunk_size):
    rng = np.random.default_rng(0)
    x, head = jnp.array(rng.normal(size=(64, 8))), jnp.array(rng.normal(size=(11, 8)))
    targets, mask = jnp.array(rng.integers(11, size=64)), jnp.array(rng.integers(2, size=64) * 1.0)

    def whole(x, head):
        log_p = jax.nn.log_softmax(x @ head.T)
        return -jnp.sum(jnp.take_along_axis(log_p, targets[:, None], 1)[:, 0] * mask)

    def chunked(x, head):
        return cross_entropy(x, head, targets, mask, chunk_size)

    np.testing.assert_allclose(chunked(x, head), whole(x, head), rtol=1e-12)
    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, head) for f in (chunked, whole))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_the_loss_has_the_gradient_of_its_mask_and_scales(x64):
    rng = np.random.default_rng(0)
    x, head = jnp.array(rng.normal(size=(3, 10, 8))), jnp.array(rng.normal(size=(11, 8)))
    targets, mask = jnp.array(rng.integers(11, size=(3, 10))), jnp.array(rng.uniform(size=(3, 10)))

    def whole(x, mask):
        log_p = jax.nn.log_softmax(x @ head.T)
        return jnp.sum(jnp.take_along_axis(log_p, targets[..., None], 2)[..., 0] * mask) ** 2

    def chunked(x, mask):
        return cross_entropy(x, head, targets, mask, 12) ** 2

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(x, mask) for f in (chunked, whole))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


def test_chunks_cost_three_products_with_the_head_in_training_and_one_in_reading():
    def loss(x, head):
        return cross_entropy(x, head, jnp.zeros(64, jnp.int32), jnp.ones(64), 16)

    arguments = (jnp.zeros((64, 8)), jnp.zeros((16, 8)))
    assert str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments)).count(" dot_general[") == 3
    assert str(jax.make_jaxpr(loss)(*arguments)).count(" dot_general[") == 1


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    rng = np.random.default_rng(0)
    x, head = rng.normal(size=(4096, 8)), rng.normal(size=(16, 8))
    targets, mask = jnp.array(rng.integers(16, size=4096)), jnp.ones(4096)

    def gradient(dtype, chunk_size):
        loss = lambda head: cross_entropy(  # noqa: E731
            jnp.array(x, dtype), head, targets, mask, chunk_size
        )
        return np.asarray(jax.grad(loss)(jnp.array(head, dtype)), np.float32)

    exact, one, many = (
        gradient(dtype, size)
        for dtype, size in ((jnp.float32, 4096), (jnp.bfloat16, 4096), (jnp.bfloat16, 8))
    )
    assert np.linalg.norm(one - exact) < 0.02 * np.linalg.norm(exact)
    # Summed in bfloat16, 512 chunks would lose a tenth.
    assert np.linalg.norm(many - exact) < 0.02 * np.linalg.norm(exact)


def test_the_loss_never_holds_all_logits():
    N, D, V, chunk = 4096, 16, 512, 128

    def loss(x, head):
        return cross_entropy(x, head, jnp.zeros(N, jnp.int32), jnp.ones(N), chunk)

    arguments = (jnp.zeros((N, D)), jnp.zeros((V, D)))
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * N * V * 4


def test_masked_targets_do_not_count():
    graphdef, params = make(TINY)
    batch = make_batch(TINY)
    other = batch._replace(targets=jnp.where(batch.mask > 0, batch.targets, 0))
    model = nnx.merge(graphdef, params)
    np.testing.assert_allclose(next_token_loss(model, batch), next_token_loss(model, other))


def test_remat_in_the_space_of_the_rank_multiplies_by_no_first_factor_again():
    """q, k, v together, o, gate and up together, down: four products fewer than from the input."""

    def products(remat):
        model = Llama(dataclasses.replace(TINY, remat=remat), nnx.Rngs(0))
        graphdef, state = nnx.split(model)
        tokens = jnp.ones((4, 16), jnp.int32)

        def total(state):
            return jnp.sum(nnx.merge(graphdef, state).hidden_states(tokens))

        return str(jax.make_jaxpr(jax.grad(total))(state)).count(" dot_general[")

    assert products("rank") == products("full") - 4
    assert products("dots") < products("rank")


def test_layers_in_the_body_of_the_loop_change_nothing():
    tokens = jnp.arange(8).reshape(1, 8)
    expected = Llama(TINY, nnx.Rngs(0))(tokens)
    found = Llama(dataclasses.replace(TINY, unroll=2), nnx.Rngs(0))(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_attention_in_blocks_or_as_one_square_is_the_same_model():
    tokens = make_batch(TINY).inputs
    expected = Llama(dataclasses.replace(TINY, attention="whole"), nnx.Rngs(0))(tokens)
    np.testing.assert_allclose(Llama(TINY, nnx.Rngs(0))(tokens), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots", "rank"])
def test_remat_changes_no_gradient(remat):
    batch = make_batch(TINY)

    def gradient(config):
        graphdef, params = make(config)
        loss = lambda p: next_token_loss(nnx.merge(graphdef, p), batch)  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    plain, rematted = gradient(TINY), gradient(dataclasses.replace(TINY, remat=remat))
    chex.assert_trees_all_close(plain, rematted, rtol=1e-4, atol=1e-5)


def test_bfloat16_activations_stay_near_float32():
    batch = make_batch(TINY)
    graphdef, params = make(TINY)
    narrow, _ = make(dataclasses.replace(TINY, dtype="bfloat16"))
    exact = next_token_loss(nnx.merge(graphdef, params), batch)
    found = next_token_loss(nnx.merge(narrow, params), batch)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-2)


def test_pure_bfloat16_stores_bfloat16():
    _, params = make(dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_the_initial_loss_is_that_of_a_uniform_guess():
    graphdef, params = make(dataclasses.replace(TINY, vocab_size=500))
    batch = make_batch(dataclasses.replace(TINY, vocab_size=500))
    loss = next_token_loss(nnx.merge(graphdef, params), batch) / batch.mask.sum()
    np.testing.assert_allclose(loss, np.log(500), rtol=0.02)


def test_sequences_beyond_the_maximum_are_refused():
    graphdef, params = make(TINY)
    with pytest.raises(ValueError, match=r"17 tokens is longer .* 16"):
        nnx.merge(graphdef, params)(jnp.zeros((1, 17), jnp.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "between 1 and 32, .* but is 0"),
        ({"rank": 33}, "between 1 and 32, .* but is 33"),
        ({"mlp_rank": 40}, "mlp_rank"),
        ({"scope": "some"}, "scope must be one of"),
        (
            {"attention": "flash"},
            "attention must be one of auto, blocks, whole, cudnn, but is 'flash'",
        ),
        ({"attention": "cudnn"}, "needs model.dtype bfloat16 or float16, but it is 'float32'"),
        ({"remat": "yes"}, "remat must be one of"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"num_heads": 5}, "num_heads = 5"),
        ({"num_kv_heads": 3}, "model.num_kv_heads = 3 must divide model.num_heads = 4"),
        ({"head_dim": 7}, "model.head_dim must be even .* but is 7"),
        ({"num_kv_heads": 1, "rank": 9}, "must be between 1 and 8"),
        ({"rope_scaling": RopeScaling("yarn")}, "rope_scaling.kind must be one of none"),
        ({"rope_scaling": RopeScaling("linear", 0.5)}, "rope_scaling.factor must be at least 1"),
        ({"num_heads": 32}, "heads of an even size"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
    ],
)
def test_configs_that_are_no_model_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        Llama(dataclasses.replace(TINY, **changes), nnx.Rngs(0))

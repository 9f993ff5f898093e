"""A config.json as it is found in the wild: what changes nothing is passed over, the rest named."""

import numpy as np
import pytest

from models.huggingface import CheckpointError
from models.huggingface.configs import from_huggingface, to_huggingface
from models.llama import LlamaConfig
from models.rope import RopeScaling, frequencies
from tests.models.checkpoints import CONFIG, our_logits, tensors, their_logits, write

# Left there by trainers, converters, generation and other architectures.
HARMLESS = {
    "_model_name_or_path": "Smollm2 135M",
    "_name_or_path": "some/where",
    "_attn_implementation_autoset": True,
    "_commit_hash": "0123",
    "_flash_attn_2_enabled": True,
    "architectures": ["LlamaForCausalLM"],
    "attention_dropout": 0.1,
    "auto_map": {"AutoModelForCausalLM": "modeling.Mine"},
    "badwordsids": [[0]],
    "begin_suppress_tokens": [1],
    "bos_token_id": 1,
    "dtype": "bfloat16",
    "end_token_id": 7,
    "gradient_checkpointing": True,
    "hidden_act": "swish",
    "id2label": {"0": "LABEL_0"},
    "is_decoder": True,
    "is_llama_config": True,
    "layer_types": ["full_attention"],
    "max_length": 4096,
    "max_sequence_length": 2048,
    "max_window_layers": 28,
    "mlp_bias": False,
    "neftune_noise_alpha": 5.0,
    "num_experts_per_tok": 2,
    "pad_token_id": -1,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 2,
    "quantization_config": {},
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "router_aux_loss_coef": 0.001,
    "task_specific_params": {"a": 1},
    "temperature": 0.6,
    "torchscript": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "unsloth_version": "2024.9",
    "a field of a program to come": [1, 2],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_field_that_changes_nothing_is_passed_over(name):
    assert from_huggingface(CONFIG | {name: HARMLESS[name]}, "here") == from_huggingface(
        CONFIG, "here"
    )


def test_with_all_of_them_the_logits_are_those_of_transformers(tmp_path):
    pytest.importorskip("transformers", reason="the counterpart needs transformers")
    # Transformers runs into an empty quantization and asks whether to run code.
    fields = HARMLESS | {"dtype": "float32", "quantization_config": ..., "auto_map": ...}
    path = write(tmp_path / "in", tensors(), **fields)
    theirs = their_logits(path)
    assert np.std(theirs) > 0.3
    np.testing.assert_allclose(our_logits(path), theirs, atol=1e-5)


ANOTHER_NETWORK = {
    "alibi": True,
    "attention_bias": True,
    "attention_chunk_size": 8192,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu",
    "is_causal": False,
    "layer_types": ["sliding_attention"],
    "logits_scaling": 8.0,
    "mlp_bias": True,
    "no_rope_layers": [0],
    "num_local_experts": 8,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 1536,
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "residual_multiplier": 0.22,
    "rope_interleaved": True,
    "rotary_dim": 4,
    "scale_emb": 12,
    "sliding_window": 32,
    "use_parallel_residual": True,
    "use_qk_norm": True,
}


@pytest.mark.parametrize("name", ANOTHER_NETWORK)
def test_a_field_that_means_another_network_is_named(name):
    with pytest.raises(CheckpointError, match=f"^here: {name} = ") as caught:
        from_huggingface(CONFIG | {name: ANOTHER_NETWORK[name]}, "here")
    assert "\n" not in str(caught.value)


def test_a_window_that_hides_nothing_is_passed_over():
    plain = from_huggingface(CONFIG, "here")
    for fields in (
        {"sliding_window": 64},
        {"sliding_window": 32, "use_sliding_window": False},
        {"attention_multiplier": 8**-0.5, "query_pre_attn_scalar": 8, "rotary_dim": 8},
    ):
        assert from_huggingface(CONFIG | fields, "here") == plain


OPTIONAL = (
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "tie_word_embeddings",
    "rope_theta",
    "architectures",
    "head_dim",
    "initializer_range",
    "attention_bias",
    "mlp_bias",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "layer_types",
    "pretraining_tp",
)


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_counts_as_absent(name):
    without = {key: value for key, value in CONFIG.items() if key != name}
    assert from_huggingface(without | {name: None}, "here") == from_huggingface(without, "here")


def test_what_transformers_takes_where_a_field_is_absent():
    transformers = pytest.importorskip("transformers", reason="the counterpart")
    theirs = transformers.LlamaConfig()
    small = {name: value for name, value in CONFIG.items() if name.startswith(("num_a", "num_hid"))}
    sizes = {name: CONFIG[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    ours = from_huggingface({"model_type": "llama"} | small | sizes, "here")
    assert ours.max_sequence_length == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.num_kv_heads is None


def test_an_architecture_says_what_a_missing_model_type_would():
    content = CONFIG | {"model_type": None}
    assert from_huggingface(content, "here") == from_huggingface(CONFIG, "here")
    with pytest.raises(CheckpointError, match="model_type = None"):
        from_huggingface(content | {"architectures": ["GPT2LMHeadModel"]}, "here")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size = '32' is not supported; expected a whole number"),
        ({"hidden_size": True}, "hidden_size = True"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers = 1.5"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
        ({"rope_theta": "big"}, "rope_theta = 'big'"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0; expected a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not a JSON object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
        ({"num_attention_heads": 0}, "num_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"model_type": "loro_llama", "loro": [1]}, r"loro = \[1\] is not a JSON object"),
    ],
)
def test_values_of_another_kind_are_named(fields, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        from_huggingface(CONFIG | fields, "here")
    assert "\n" not in str(caught.value)


def test_whole_numbers_may_be_written_as_fractions():
    content = CONFIG | {"max_position_embeddings": 64.0, "hidden_size": 32.0}
    assert from_huggingface(content, "here") == from_huggingface(CONFIG, "here")


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEFAULT = {"rope_type": "default"}
ROTARY = {
    "nothing": {"rope_theta": None},
    "a base": {"rope_theta": 5e5},
    "a base that is whole": {"rope_theta": 500000},
    "today's base": {"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_theta": None},
    "two bases": {"rope_parameters": DEFAULT | {"rope_theta": 5e5}, "rope_theta": 1e6},
    "no base inside": {"rope_parameters": DEFAULT, "rope_theta": 1e6},
    "the old name of a kind": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "both names of a kind": {"rope_scaling": LINEAR | {"type": "llama3"}},
    "scaling beside default parameters": {
        "rope_parameters": DEFAULT | {"rope_theta": 1e4},
        "rope_scaling": LINEAR,
    },
    "scaling beside another base": {
        "rope_parameters": DEFAULT | {"rope_theta": 5e5},
        "rope_scaling": LINEAR,
        "rope_theta": ...,
    },
    "default scaling beside scaled parameters": {
        "rope_parameters": LINEAR,
        "rope_scaling": DEFAULT,
    },
    "empty scaling beside parameters": {"rope_parameters": LINEAR, "rope_scaling": {}},
    "null scaling beside parameters": {"rope_parameters": LLAMA3, "rope_scaling": None},
    "a base in the scaling": {"rope_scaling": LLAMA3 | {"rope_theta": 7e4}, "rope_theta": 1e6},
    "numbers of another kind": {"rope_scaling": DEFAULT | {"factor": 3.0, "beta_fast": 32}},
    "numbers that linear does not use": {"rope_scaling": LINEAR | {"attention_factor": 1.2}},
    "an original length outside": {
        "rope_scaling": LLAMA3,
        "original_max_position_embeddings": 8,
    },
    "no original length": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    },
    "all of it, as older programs want it": {
        "rope_parameters": LLAMA3 | {"rope_theta": 5e5},
        "rope_scaling": LLAMA3,
        "rope_theta": 5e5,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ROTARY)
def test_rotary_angles_are_those_of_transformers(case):
    transformers = pytest.importorskip("transformers", minversion="5", reason="the counterpart")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    content = {k: v for k, v in (CONFIG | ROTARY[case]).items() if v is not ...}
    ours = from_huggingface(content, "here")
    found = frequencies(ours.head_size, ours.rope_theta, ours.rope_scaling)
    # Null is no base for transformers, where the field is said to be optional.
    fields = {k: v for k, v in content.items() if v is not None and k != "model_type"}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**fields))
    np.testing.assert_allclose(found, theirs.inv_freq.numpy(), rtol=1e-5)


def test_a_file_of_today_with_the_scaling_of_an_exporter_keeps_the_scaling():
    content = CONFIG | {"rope_parameters": DEFAULT | {"rope_theta": 1e4}, "rope_scaling": LINEAR}
    assert from_huggingface(content, "here").rope_scaling == RopeScaling("linear", 2.0)


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type = 'yarn' is not supported"),
        ({"type": "dynamic", "factor": 4.0}, "rope_type = 'dynamic' is not supported"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "rope_type = 'longrope'"),
        (LINEAR | {"factor": None}, "factor is missing"),
        (LINEAR | {"factor": "2"}, "factor = '2'"),
        (LINEAR | {"factor": 0.5}, "factor must be at least 1"),
        (LLAMA3 | {"low_freq_factor": ...}, "low_freq_factor is missing"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_frequency must be"),
        (DEFAULT | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        (DEFAULT | {"mrope_section": [2, 1, 1]}, "mrope_section"),
        ({"full_attention": DEFAULT, "sliding_attention": LINEAR}, "full_attention = "),
    ],
)
def test_rotary_positions_that_are_not_supported_are_named(place, rope, message):
    rope = {k: v for k, v in rope.items() if v is not ...}
    beside = {"rope_parameters": DEFAULT} if place == "rope_scaling" else {}
    with pytest.raises(CheckpointError, match=message) as caught:
        from_huggingface(CONFIG | beside | {place: rope}, "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(),
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
        RopeScaling("llama3", 32.0, 2.0, 8.0, 4096),
    ],
)
def test_what_is_written_is_read(scaling):
    config = LlamaConfig(scope="none", rope_theta=7e4, rope_scaling=scaling)
    content = to_huggingface(config, "float32", factored=False)
    assert from_huggingface(content, "here") == config
    # Each of the three fields is enough, as programs of different years read them.
    for left_out in (("rope_parameters",), ("rope_scaling", "rope_theta")):
        older = {name: value for name, value in content.items() if name not in left_out}
        assert from_huggingface(older, "here") == config

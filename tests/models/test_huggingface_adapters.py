"""Adapters in PEFT's format: ours load there, theirs load here, with the same logits."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from loro_jax.layers.adapters import AdapterSpec, adapt
from models import Llama, preset
from models.huggingface import CheckpointError, read_model, write_model
from models.huggingface.adapter_reading import (
    adapter_arrays,
    adapter_fields,
    merge_stored_adapter,
    read_adapter,
)
from models.huggingface.adapter_writing import write_adapter
from tests.helpers import outputs, some_fast

# Sides of 32, 16 (keys and values) and 88; none but bone's rank has to divide them.
CONFIG = preset("tiny", scope="none", num_kv_heads=2, intermediate_size=88)
TOKENS = np.random.default_rng(0).integers(CONFIG.vocab_size, size=(2, 12))


def stirred(model, seed=1):
    """The network with random values in all that is trained."""
    rng = np.random.default_rng(seed)
    for _, leaf in nnx.iter_graph(model):
        if isinstance(leaf, nnx.Param):
            leaf[...] = jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "model"
    write_model(Llama(CONFIG, nnx.Rngs(0)), path)
    return path


def adapted(base, spec, where="blocks/**"):
    model, _ = read_model(base)
    return stirred(adapt(model, spec, where=where))


def theirs(base):
    """The base in transformers, PEFT, and torch."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return model, peft, torch


def logits_of(model, torch):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


SPECS = {
    "lora": AdapterSpec("lora", rank=3, alpha=8.0),
    "rslora": AdapterSpec("lora", rank=3, alpha=8.0, rank_stabilised=True),
    "lora_sb": AdapterSpec("lora_sb", rank=3),
    "miss": AdapterSpec("miss", rank=3),
    "bone": AdapterSpec("bone", rank=4),
    "randlora": AdapterSpec("randlora", rank=3, seed=7),
    "adalora": AdapterSpec("adalora", rank=3, alpha=40.0),
    "increlora": AdapterSpec("increlora", rank=3, alpha=40.0),
    "gated": AdapterSpec("gated", rank=3, alpha=40.0),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT and torch
@pytest.mark.parametrize("kind", some_fast(SPECS, ["lora", "randlora", "adalora"]))
def test_peft_computes_our_logits(base, tmp_path, kind):
    model = adapted(base, SPECS[kind])
    write_adapter(model, tmp_path / "adapter", base=str(base))
    expected = outputs(model, TOKENS)
    plain = outputs(read_model(base)[0], TOKENS)
    assert np.abs(expected - plain).max() > 0.05
    dense, peft, torch = theirs(base)
    found = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter")
    np.testing.assert_allclose(logits_of(found, torch), expected, atol=1e-4)
    # Written with the same values as were read.
    assert found.peft_config["default"].base_model_name_or_path == str(base)


@pytest.mark.parametrize("kind", some_fast(SPECS, ["lora", "lora_sb", "miss"]))
def test_what_is_written_is_read(base, tmp_path, kind):
    model = adapted(base, SPECS[kind], where=["blocks/*/q", "blocks/*/down"])
    write_adapter(model, tmp_path / "adapter")
    expected = outputs(model, TOKENS)
    merged, _ = read_model(base)
    merge_stored_adapter(merged, tmp_path / "adapter")
    np.testing.assert_allclose(outputs(merged, TOKENS), expected, atol=1e-4)
    if kind in ("lora", "miss", "bone"):
        stored = read_adapter(tmp_path / "adapter", CONFIG)
        fields = adapter_fields(stored.config, CONFIG)
        assert (fields["kind"], fields["rank"]) == (SPECS[kind].kind, SPECS[kind].rank)
        assert fields["names"] == ("q", "down")
        q = nnx.to_pure_dict(nnx.state(model.blocks.attention.q.adapter, nnx.Param))
        found = adapter_arrays(stored)["attention", "q"]
        jax.tree.map(np.testing.assert_array_equal, found, q)
        if kind == "lora":
            np.testing.assert_allclose(fields["alpha"], 8.0)


def test_it_is_written_and_read_in_16_bits(base, tmp_path):
    model = adapted(base, SPECS["lora"])
    sizes = [
        write_adapter(model, tmp_path / dtype, dtype=dtype) for dtype in ("float32", "bfloat16")
    ]
    assert sizes[0] == 2 * sizes[1]
    merged, _ = read_model(base)
    merge_stored_adapter(merged, tmp_path / "bfloat16")
    expected = outputs(model, TOKENS)
    np.testing.assert_allclose(outputs(merged, TOKENS), expected, atol=0.05)
    with pytest.raises(CheckpointError, match="exists already"):
        write_adapter(model, tmp_path / "bfloat16")
    with pytest.raises(CheckpointError, match="dtype must be one of float32, float16"):
        write_adapter(model, tmp_path / "int8", dtype="int8")


def of_peft(peft):
    lora = {"r": 4, "lora_alpha": 6}
    adalora = {"init_r": 5, "target_r": 2, "total_step": 10, "lora_alpha": 60}
    return {
        "lora": peft.LoraConfig(target_modules=["q_proj", "mlp.down_proj"], **lora),
        "rslora": peft.LoraConfig(target_modules="all-linear", use_rslora=True, **lora),
        "regex": peft.LoraConfig(target_modules=r".*\.1\..*(q|up)_proj", **lora),
        "some layers": peft.LoraConfig(
            target_modules=["q_proj"], layers_to_transform=[1], exclude_modules=["v_proj"], **lora
        ),
        "patterns": peft.LoraConfig(
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"q_proj": 2},
            alpha_pattern={r"layers\.0\.self_attn\.o_proj": 3},
            **lora,
        ),
        "adalora": peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], **adalora),
        "pruned adalora": peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], **adalora),
        "randlora": peft.RandLoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=3),
        "sparse randlora": peft.RandLoraConfig(target_modules=["v_proj"], r=3, sparse=True),
        "miss": peft.MissConfig(target_modules=["q_proj", "down_proj"], r=6),
        "bat": peft.MissConfig(target_modules=["q_proj", "down_proj"], r=4, init_weights="bat"),
        "mini": peft.MissConfig(target_modules=["q_proj"], r=6, mini_r=8, init_weights="mini"),
    }


FORMS = [
    "lora",
    "rslora",
    "regex",
    "some layers",
    "patterns",
    "adalora",
    "pruned adalora",
    "randlora",
    "sparse randlora",
    "miss",
    "bat",
    "mini",
]
FAST_FORMS = ("lora", "patterns", "pruned adalora", "sparse randlora", "bat")


def prune(model, torch):
    """Leaves two ranks of each module, as at the end of AdaLoRA."""
    pattern = {}
    for name, p in model.named_parameters():
        if "lora_E" in name:
            with torch.no_grad():
                p[2:] = 0
            pattern[name.removeprefix("base_model.model.")] = [True, True, False, False, False]
    model.peft_config["default"].rank_pattern = pattern


def saved_by_peft(base, tmp_path, form):
    """A directory that PEFT has written, and its logits."""
    dense, peft, torch = theirs(base)
    model = peft.get_peft_model(dense, of_peft(peft)[form])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "randlora" not in name:
                p.add_(0.2 * torch.randn_like(p))
            elif p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    if form == "pruned adalora":
        prune(model, torch)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits_of(model, torch)


@pytest.mark.filterwarnings("ignore")  # of PEFT and torch
@pytest.mark.parametrize("form", some_fast(FORMS, FAST_FORMS))
def test_we_compute_the_logits_of_peft(base, tmp_path, form):
    directory, expected = saved_by_peft(base, tmp_path, form)
    model, _ = read_model(base)
    plain = outputs(model, TOKENS)
    assert np.abs(expected - plain).max() > 0.01
    merge_stored_adapter(model, directory)
    np.testing.assert_allclose(outputs(model, TOKENS), expected, atol=2e-5)


@pytest.mark.filterwarnings("ignore")  # of PEFT and torch
@pytest.mark.parametrize("form", ["rslora", "adalora", "bat"])
def test_training_continues_what_peft_has_written(base, tmp_path, form):
    directory, expected = saved_by_peft(base, tmp_path, form)
    stored = read_adapter(directory, CONFIG)
    fields = adapter_fields(stored.config, CONFIG)
    where = [f"blocks/*/{name}" for name in fields.pop("names")]
    model = adapt(read_model(base)[0], AdapterSpec(**fields), where=where)
    for (part, name), arrays in adapter_arrays(stored).items():
        adapter = getattr(getattr(model.blocks, part), name).adapter
        for variable, value in arrays.items():
            own = getattr(adapter, variable)
            assert own.shape == value.shape
            own[...] = jnp.asarray(value)
    np.testing.assert_allclose(outputs(model, TOKENS), expected, atol=2e-5)


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory):
    """A directory of ours: LoRA on q in both layers."""
    path = tmp_path_factory.mktemp("ours") / "adapter"
    write_adapter(adapted(base, SPECS["lora"], where="blocks/*/q"), path)
    return path


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type = 'LOHA' is not read; expected LORA, ADALORA"),
        ({"use_dora": True}, r"use_dora = True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not supported"),
        ({"bias": "all"}, r"bias = 'all'; expected 'none'"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights = 'pissa' changes the base"),
        ({"r": 4}, r"q_proj.lora_A.weight has shape \(3, 32\); expected \(4, 32\) for this base"),
        ({"r": 0}, r"r = 0; expected at least 1"),
        ({"target_modules": ["q_proj", "k_proj"]}, r"k_proj.lora_A.weight is missing"),
        ({"target_modules": "(.*"}, r"'\(\.\*' is no regular expression"),
        ({"target_modules": ["query"]}, r"target_modules = \['query'\] matches no projection"),
        ({"target_modules": ["lm_head"]}, r"target_modules names lm_head; expected projections"),
        ({"target_modules": None}, r"target_modules = None; expected a list of names"),
        ({"layers_to_transform": 0}, r"holds .*layers.1.*; expected tensors of the base's"),
    ],
)
def test_what_is_not_read_is_one_line(ours, tmp_path, changes, message):
    shutil.copytree(ours, tmp_path / "adapter")
    config = json.loads((ours / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_adapter(tmp_path / "adapter", CONFIG)
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base_is_one_line(ours, tmp_path):
    tall = preset("tiny", scope="none", hidden_size=64, num_heads=4, num_kv_heads=2)
    with pytest.raises(CheckpointError, match=r"expected \(3, 64\) for this base"):
        read_adapter(ours, tall)
    deep = preset("tiny", scope="none", num_kv_heads=2, num_layers=3)
    with pytest.raises(CheckpointError, match=r"layers.2.self_attn.q_proj.* is missing"):
        read_adapter(ours, deep)
    shallow = preset("tiny", scope="none", num_kv_heads=2, num_layers=1)
    with pytest.raises(CheckpointError, match=r"holds .*layers.1"):
        read_adapter(ours, shallow)


def test_damaged_directories_are_one_line(ours, base, tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        read_adapter(tmp_path / "none", CONFIG)
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        read_adapter(base, CONFIG)
    path = shutil.copytree(ours, tmp_path / "adapter")
    tensors = load_file(path / "adapter_model.safetensors")
    nan = {name: np.full_like(value, np.nan) for name, value in tensors.items()}
    save_file(nan, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"are not finite"):
        read_adapter(path, CONFIG)
    (path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"can't be read as safetensors"):
        read_adapter(path, CONFIG)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"safetensors, not adapter_model.bin"):
        read_adapter(path, CONFIG)


def test_what_has_no_counterpart_is_refused(base, tmp_path):
    out = tmp_path / "adapter"
    with pytest.raises(CheckpointError, match="has no adapters"):
        write_adapter(read_model(base)[0], out)
    with pytest.raises(CheckpointError, match=r"'up', 32 inputs to 88 outputs, has no"):
        write_adapter(adapted(base, AdapterSpec("bone", rank=16), where="blocks/*/up"), out)
    model = adapt(read_model(base)[0], SPECS["lora"], where="blocks/*/q", trained=["norm"])
    with pytest.raises(CheckpointError, match=r"norm/scale was trained, too"):
        write_adapter(model, out)
    sparse = AdapterSpec("sltrain", rank=3)
    with pytest.raises(CheckpointError, match=r"class Sltrain have no counterpart in PEFT"):
        write_adapter(adapted(base, sparse, where="blocks/*/q"), out)
    assert list(tmp_path.iterdir()) == []
    factored = Llama(preset("tiny"), nnx.Rngs(0))
    write_adapter(adapted(base, SPECS["lora"], where="blocks/*/down"), out)
    with pytest.raises(CheckpointError, match=r"expected \(3, "):
        merge_stored_adapter(factored, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA", "rank_pattern": {"x": []}}, r"ranks of this adapter are pruned"),
        ({"peft_type": "RANDLORA"}, r"form RANDLORA can be merged into its base, but not trained"),
        ({"layers_to_transform": [1]}, r"q_proj is adapted in 1 of 2 layers; expected all"),
        ({"alpha_pattern": {r"layers\.1.*": 2}}, r"ranks or scales of projections differ"),
    ],
)
def test_what_can_not_be_trained_is_refused(ours, tmp_path, changes, message):
    from models.huggingface.adapter_configs import read_adapter_config

    config = json.loads((ours / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError, match=message):
        adapter_fields(read_adapter_config(tmp_path), CONFIG)

"""Small directories of Hugging Face's format, made without our own writer."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from models.huggingface import read_model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
TOKENS = np.random.default_rng(0).integers(3, 96, size=(2, 12))


def tensors(seed=0, kv_heads=2):
    """Tensors of CONFIG's model, by their names."""
    rng = np.random.default_rng(seed)
    layer = "model.layers.0."
    shapes = {
        EMBEDDING: (96, 32),
        f"{layer}self_attn.q_proj.weight": (32, 32),
        f"{layer}self_attn.k_proj.weight": (8 * kv_heads, 32),
        f"{layer}self_attn.v_proj.weight": (8 * kv_heads, 32),
        f"{layer}self_attn.o_proj.weight": (32, 32),
        f"{layer}mlp.gate_proj.weight": (48, 32),
        UP: (48, 32),
        f"{layer}mlp.down_proj.weight": (32, 48),
        HEAD: (96, 32),
    }
    found = {n: rng.normal(scale=0.2, size=s).astype(np.float32) for n, s in shapes.items()}
    for name in ("model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm"):
        found[f"{name}.weight"] = 1 + rng.normal(scale=0.2, size=32).astype(np.float32)
    return found


def write(path, stored, config=None, name="model.safetensors", **changes):
    """A directory with these tensors and a config; a field that is ... is left out."""
    path.mkdir(exist_ok=True)
    content = {k: v for k, v in ((config or CONFIG) | changes).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(content))
    save_file(stored, path / name, metadata={"format": "pt"})
    return path


def our_logits(path):
    """Of the model in a directory, by this project."""
    return np.asarray(read_model(path)[0](jnp.array(TOKENS)))


def their_logits(path):
    """The same by transformers, in float32."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()

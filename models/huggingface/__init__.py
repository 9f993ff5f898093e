"""Reading and writing LLaMA checkpoints in Hugging Face's format.

A directory holds ``config.json``, ``model.safetensors`` (or several files and an index) and the
files of a tokenizer. In the merged form all projections are dense, and any program can read it. The
factored form (``model_type`` "loro_llama") is specific to this project and holds each projection as
it was trained:

    model.layers.0.self_attn.q_proj.B        (out x r)
    model.layers.0.self_attn.q_proj.A        (r x in)

and the other variables of its kind (``weight``: the frozen matrix of "lora"; ``values`` and
``columns`` of "sltrain"; ``W_s`` and ``channels`` of "lost"; ``U``, ``S``, ``Vt`` and ``active`` of
"sst"; ``U_high``, ``S_high``, ``Vt_high`` and ``S`` of "osft"). All other names are those of the
merged form.
"""

from models.huggingface.errors import CheckpointError
from models.huggingface.parameters import LayerError, check_parameters, read_parameters
from models.huggingface.reading import read_config, read_model
from models.huggingface.writing import write_model

__all__ = [
    "CheckpointError",
    "LayerError",
    "check_parameters",
    "read_config",
    "read_model",
    "read_parameters",
    "write_model",
]

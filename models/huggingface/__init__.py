"""LLaMA checkpoints of Hugging Face's format, read and written.

A directory holds ``config.json``, ``model.safetensors`` (or several, with an index) and the files
of a tokenizer. Merged, its projections are dense and any program reads it; factored, it is ours
alone (``model_type`` "loro_llama") and holds each projection as it was trained:

    model.layers.0.self_attn.q_proj.B        (out x r)
    model.layers.0.self_attn.q_proj.A        (r x in)

and whatever else its kind has (``weight``: the fixed matrix of "lora"; ``values`` and ``columns``
of "sltrain"). All other names are those of the merged form.
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

"""What the process of PyTorch runs: it takes its work from the first argument, and waits.

Started by its path, so that neither JAX nor loro_jax is imported. Each line on standard input asks
for one call; the answer is a line of JSON on standard output.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any


def _library(name: str) -> Any:
    # By name and when it is needed: doctests and type checkers read this file without it.
    return importlib.import_module(name)


def read_model(directory: str) -> Any:
    """Returns transformers' LLaMA with the weights of a directory, factorised where they are."""
    transformers, safetensors = _library("transformers"), _library("safetensors.torch")
    content = json.loads((pathlib.Path(directory) / "config.json").read_text("utf-8"))
    factorised = content.pop("loro", None)
    if factorised is None:
        return transformers.AutoModelForCausalLM.from_pretrained(directory).float()
    names = ("model_type", "architectures", "torch_dtype")
    kept = {name: value for name, value in content.items() if name not in names}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kept))
    weights: dict[str, Any] = {}
    for path in pathlib.Path(directory).glob("*.safetensors"):
        weights |= safetensors.load_file(path)
    for name in [name for name in weights if name.endswith(".A")]:
        A, B = weights.pop(name), weights.pop(f"{name[:-2]}.B")
        parent, _, attribute = name[:-2].rpartition(".")
        setattr(model.get_submodule(parent), attribute, _low_rank(B, A))
        weights |= {f"{name[:-2]}.0.weight": A, f"{name[:-2]}.1.weight": B}
    model.load_state_dict(weights)
    return model


def _low_rank(B: Any, A: Any) -> Any:
    """Returns ``y = B (A x)``."""
    nn = _library("torch").nn
    first = nn.Linear(A.shape[1], A.shape[0], bias=False)
    return nn.Sequential(first, nn.Linear(B.shape[1], B.shape[0], bias=False))


def training(settings: dict[str, Any]) -> Callable[[], float]:
    """Returns a step of fused AdamW, which returns the loss before it."""
    torch = _library("torch")
    model = read_model(settings["directory"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings["adamw"])
    inputs, targets = (torch.tensor(settings[name]) for name in ("inputs", "targets"))
    parts = settings["micro_batches"]
    batches = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for ids, following in batches:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())
            (loss / parts).backward()
            total += loss.item() / parts
        if settings["clip_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
        optimizer.step()
        return total

    return step


def generation(settings: dict[str, Any]) -> Callable[[], list[list[int]]]:
    """Returns a function that continues the prompts greedily and returns the new tokens."""
    torch = _library("torch")
    model = read_model(settings["directory"]).eval()
    ids = torch.tensor(settings["prompts"])
    new = settings["new_tokens"]

    def generate() -> list[list[int]]:
        with torch.inference_mode():
            whole = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return whole[:, ids.shape[1] :].tolist()

    return generate


def main() -> None:
    """Answers requests until standard input ends."""
    # What libraries print must not come between the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(pathlib.Path(sys.argv[1]).read_text("utf-8"))
    _library("torch").set_num_threads(settings["threads"])
    run = {"training": training, "generation": generation}[settings["work"]](settings)
    for _ in sys.stdin:
        started, processor = time.perf_counter(), time.process_time()
        result = run()
        answer = {
            "seconds": time.perf_counter() - started,
            "processor": time.process_time() - processor,
            "result": result,
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

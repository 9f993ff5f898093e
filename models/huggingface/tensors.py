"""Lazily read tensors of a directory's safetensors files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from models.huggingface.errors import CheckpointError
from models.huggingface.files import INDEX, SINGLE, read_json
from models.huggingface.names import EMBEDDING, HEAD

# Floating-point types of the format that neither NumPy nor safetensors reads.
_EIGHT_BITS: dict[str, Any] = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
_FLOATING = ("F64", "F32", "BF16", "F16", *_EIGHT_BITS)
# Stored in some files although computed from the config.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


class StoredTensors:
    """The tensors of a directory.

    ``model.safetensors`` takes precedence over an index and its files, as in transformers; an index
    that is damaged or names missing files is an error even then.

    Args:
        directory: a directory with ``model.safetensors``, or several files and their index.

    Raises:
        CheckpointError: if a file is missing or damaged, or an index names a missing file.
    """

    # Name of the file, unless there is an index.
    file = SINGLE

    def __init__(self, directory: pathlib.Path):
        self._directory = directory
        self._files: dict[str, tuple[pathlib.Path, Any, str]] = {}
        index: dict[str, str] = {}
        single = (directory / self.file).exists()
        # Read and checked even if the single file takes precedence.
        if (directory / INDEX).exists():
            index = _weight_map(directory / INDEX)
            _check_files(directory, set(index.values()), single)
        elif not single:
            raise CheckpointError(_no_model(directory))
        files = {self.file} if single else set(index.values())
        for file in sorted(files):
            path = directory / file
            opened, names = _opened(path)
            # If several files hold a tensor, the index says which one to read.
            own = [name for name in names if single or index.get(name, file) == file]
            self._files |= {name: (path, opened, name) for name in own}
        self._rename()

    def _rename(self) -> None:
        """Gives tensors the names that a network has for them."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a stored tensor."""
        _, file, stored = self._files[name]
        return tuple(file.get_slice(stored).get_shape())

    def kind(self, name: str) -> str:
        """Returns the safetensors dtype of a stored tensor, such as "BF16"."""
        _, file, stored = self._files[name]
        return file.get_slice(stored).get_dtype()

    def read(self, name: str) -> np.ndarray:
        """Reads a stored tensor."""
        path, file, stored = self._files[name]
        kind = self.kind(name)
        try:
            if kind in _EIGHT_BITS:
                return _bytes(path, stored).view(_EIGHT_BITS[kind]).reshape(self.shape(name))
            return file.get_tensor(stored)
        except (SafetensorError, OSError, AttributeError, TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path}: {stored}, stored as {kind}, can't be read ({error})."
            ) from None

    def check_floating(self, names: Iterable[str]) -> None:
        """Raises CheckpointError if one of these tensors does not hold floating-point numbers."""
        for name in names:
            if self.kind(name) not in _FLOATING:
                path, _, stored = self._files[name]
                raise CheckpointError(
                    f"{path}: {stored} is stored as {self.kind(name)}; expected floating-point "
                    f"numbers ({', '.join(_FLOATING)}), not quantised ones."
                )

    def dtype(self) -> str:
        """Returns the narrowest supported dtype that holds all stored floating-point tensors.

        Float64 tensors count as float32.
        """
        kinds = {self.kind(name) for name in self._files}
        # Neither 16-bit format holds all numbers of the other.
        if kinds & {"F64", "F32"} or {"F16", "BF16"} <= kinds:
            return "float32"
        return "float16" if "F16" in kinds else "bfloat16"


class Tensors(StoredTensors):
    """The tensors of a directory, by the names of a LLaMA with a head.

    The prefix "model.", missing in files of models without a head, is added. A model with tied
    embeddings may be stored with either matrix. Stored rotary frequencies are ignored.

    Args:
        directory: as in :class:`StoredTensors`.
        tied: whether the head shares the embedding's matrix.

    Raises:
        CheckpointError: as in :class:`StoredTensors`, and if a tied model has two different
            matrices.
    """

    def __init__(self, directory: pathlib.Path, tied: bool):
        self._tied = tied
        super().__init__(directory)

    def _rename(self) -> None:
        for name in [name for name in self._files if name.endswith(_COMPUTED)]:
            del self._files[name]
        # Files of a bare LlamaModel have no prefix.
        if not any(name.startswith("model.") for name in self._files):
            self._files = {
                name if name == HEAD else f"model.{name}": place
                for name, place in self._files.items()
            }
        if not self._tied or HEAD not in self._files:
            return
        head = self._files[HEAD]
        # Some programs drop the embedding of a tied model, others the head.
        if EMBEDDING not in self._files:
            self._files[EMBEDDING] = head
        elif self.shape(HEAD) != self.shape(EMBEDDING) or not np.array_equal(
            self.read(HEAD), self.read(EMBEDDING)
        ):
            raise CheckpointError(
                f"{self._directory}: config.json ties the head to the embedding, but {HEAD} and "
                f"{EMBEDDING} differ; expected tie_word_embeddings false (to keep both) or one "
                "matrix only."
            )
        del self._files[HEAD]


def _no_model(directory: pathlib.Path) -> str:
    """Returns the message for a directory without a model, naming what it holds instead."""
    expected = f"expected {SINGLE} or {INDEX}"
    others = sorted(path.name for path in directory.glob("*.bin"))
    others += sorted(path.name for path in directory.glob("*.safetensors"))
    others += sorted(path.name for path in directory.glob("*.gguf"))
    beside = f", not {others[0]}" if others else ""
    return f"{directory} holds no model: {expected}{beside}."


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """Reads file names by tensor from an index."""
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{path}: weight_map is missing; expected file names by tensor.")
    for name, file in found.items():
        if not isinstance(file, str):
            raise CheckpointError(f"{path}: the file of {name} is {file!r}; expected a file name.")
    return found


def _check_files(directory: pathlib.Path, files: set[str], single: bool) -> None:
    """Raises if an index names missing files."""
    for file in sorted(files):
        if not (directory / file).exists():
            beside = f" (without the index, {SINGLE} would be read)" if single else ""
            raise CheckpointError(f"{directory / file} is missing; {INDEX} names it{beside}.")


def _opened(path: pathlib.Path) -> tuple[Any, list[str]]:
    """Opens a file; returns it and the names of its tensors."""
    try:
        file = safe_open(path, framework="np")
        return file, list(file.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} can't be read as safetensors, it is damaged or cut short ({error})."
        ) from None


def _bytes(path: pathlib.Path, name: str) -> np.ndarray:
    """Reads the bytes of a tensor from a file that safetensors has checked.

    The format: the length of the header (8 bytes), the header (JSON), the tensors.
    """
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        first, last = json.loads(file.read(start))[name]["data_offsets"]
        file.seek(8 + start + first)
        return np.frombuffer(file.read(last - first), np.uint8)

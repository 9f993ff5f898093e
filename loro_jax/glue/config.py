"""The part of a run's config that is about the tables of GLUE."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses

from loro_jax.fields import at_least, field


@dataclasses.dataclass
class GlueConfig:
    """Tables, tokenizer, and lengths."""

    source: str = field(
        "data/glue",
        None,
        "folder of GLUE or of the task, with .tsv, .jsonl or .parquet files; or tfds:glue",
    )
    data_dir: str | None = field(None, None, "directory of tensorflow-datasets")
    tokenizer: str | None = field(
        None,
        None,
        "directory of tokenizer.json, or of vocab.json and merges.txt; none: init_from",
    )
    buckets: int = field(
        1,
        at_least(1),
        "lengths that batches are padded to: that of the longest row, halves of it, ...; each is "
        "compiled when it first occurs",
    )

"""From text to batches of token ids.

readers.py reads files (archives.py unpacks them, content.py detects their format, tables.py reads
Parquet, tally.py counts malformed documents), documents.py reads all parts of a source in order,
and tfds_source.py reads tensorflow-datasets; sources.py resolves a source's name. records.py makes
documents of records with answers, conversations.py of chats by the templates of chat.py, and
marked.py marks the tokens that are scored. encoding.py turns texts into ids, shards.py stores them
in memory, and prepare.py writes them to disk (prepared.py reads them again). mixture.py opens all
sources of a run; packing.py and streams.py cut them into sequences, and batches.py defines the
order of training.
"""

from loro_jax.text.batches import describe, train_iterator
from loro_jax.text.mixture import Corpus, load_corpus

__all__ = [
    "Corpus",
    "describe",
    "load_corpus",
    "train_iterator",
]

"""From text to batches of token ids.

readers.py reads files (archives.py unpacks them, content.py tells what they hold, tables.py reads
Parquet, tally.py counts what is bad), documents.py all parts of a source in order, tfds_source.py
tensorflow-datasets; sources.py says what a source may be. encoding.py turns texts into ids,
shards.py holds them, and prepare.py writes them to disk (prepared.py reads them again). mixture.py
opens all that a run reads; packing.py and streams.py cut it into sequences, and batches.py is the
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

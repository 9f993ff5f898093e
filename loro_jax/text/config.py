"""The ``data`` group of a run's config."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses


@dataclasses.dataclass
class DataConfig:
    """Where the text comes from.

    Attributes:
        source: "embedded" (four novels, part of the package), a glob of .txt, .jsonl or .parquet
            files (the first two also packed: .gz, .xz, .zst, .bz2), "tfds:NAME" (a prepared
            tensorflow-datasets text dataset, ``tfds:c4/en`` say), a directory that
            ``python -m loro_jax prepare`` has written, or several of these with
            weights: "SOURCE,WEIGHT;SOURCE,WEIGHT". Weights are shares of the sequences (of the
            documents, where sequences are packed on the way).
        validation: a glob like ``source`` for the validation text, instead of what the source has:
            its validation split or, where there is none, one document in a hundred by a hash of
            its text (of unsplit "tfds:" datasets that are not prepared: every hundredth record).
        tokenizer: "embedded" (BPE with 2,048 pieces, trained on the embedded novels), "bytes", or
            the path of a SentencePiece model or of a Hugging Face tokenizer.json.
        eos_id: the id that ends a document; None: as the tokenizer says.
        pad_id: the id that fills a short sequence; None: as the tokenizer says.
        vocab_multiple: what the model's vocabulary is rounded up to, where ``model.vocab_size`` is
            0: as large as the tokenizer's.
        shape: "packed" (documents joined by end-of-text tokens and cut into sequences) or "padded"
            (each document truncated or padded to one sequence, as in the paper).
        text_field: the field of a JSON line, table or tfds example that holds the text.
        text_files: what a .txt file holds: "paragraphs" (documents separated by blank lines; a file
            that begins like JSON lines is read as such) or "documents" (one, whatever it is). Lines
            that end with CR LF or CR are read as if they ended with LF.
        bad_documents: what to do with malformed lines, invalid UTF-8, damaged archives, missing
            shards and their kin: "stop" when there are more than 0.1% of them, or "skip" them all.
        data_dir: directory of prepared tensorflow-datasets; None: their default.
        max_eval_sequences: size of the fixed validation set, in sequences; 0: all of it.
        prefetch: batches prepared ahead of the step.
        threads: threads that encode text and assemble batches; 0: as many as there are cores.
    """

    source: str = "embedded"
    validation: str | None = None
    tokenizer: str = "embedded"
    eos_id: int | None = None
    pad_id: int | None = None
    vocab_multiple: int = 128
    shape: str = "packed"
    text_field: str = "text"
    text_files: str = "paragraphs"
    bad_documents: str = "stop"
    data_dir: str | None = None
    max_eval_sequences: int = 0
    prefetch: int = 4
    threads: int = 0

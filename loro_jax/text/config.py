"""The ``data`` group of a run's config."""

# No `from __future__ import annotations` here: the command line reads the fields' types.

import dataclasses

from loro_jax.fields import at_least, either, field, one_of


@dataclasses.dataclass
class DataConfig:
    """The corpus and the tokenizer of a run."""

    source: str = field(
        "embedded",
        None,
        "embedded (four novels, part of the package), a glob of .txt, .jsonl or .parquet files "
        "(the first two also compressed: .gz, .xz, .zst, .bz2), tfds:NAME (a prepared "
        "tensorflow-datasets text dataset, such as tfds:c4/en), a directory written by the command "
        'prepare, or several of these with weights, "SOURCE,WEIGHT;SOURCE,WEIGHT": fractions of '
        "the sequences (of the documents, if sequences are packed on the fly)",
    )
    validation: str | None = field(
        None,
        None,
        "a glob like source for the validation text; none: the source's validation split or, if it "
        "has none, one document in a hundred, chosen by a hash of its text (for unsplit tfds: "
        "datasets that are not prepared: every hundredth record)",
    )
    tokenizer: str = field(
        "embedded",
        None,
        "embedded (BPE with 2,048 pieces, trained on the embedded novels), bytes, or the path of a "
        "SentencePiece model or of a Hugging Face tokenizer.json; init_from: the one of "
        "config.init_from",
    )
    eos_id: int | None = field(None, None, "the id that ends a document; none: the tokenizer's")
    pad_id: int | None = field(
        None, None, "the id that pads a short sequence; none: the tokenizer's"
    )
    vocab_multiple: int = field(
        128,
        at_least(1),
        "the model's vocabulary is rounded up to a multiple of this if model.vocab_size is 0 (the "
        "tokenizer's)",
    )
    shape: str = field(
        "packed",
        either("packed", "padded"),
        "packed (documents joined by end-of-text tokens and cut into sequences) or padded (each "
        "document truncated or padded to one sequence, as in the paper; records without a token of "
        "an answer left are dropped)",
    )
    text_field: str = field(
        "text", None, "the field of a JSON line, table or tfds example that contains the text"
    )
    format: str = field(
        "text",
        one_of(("text", "prompt_answer", "chat")),
        "content of a record (a JSON line, a row of a table): text; prompt_answer, a prompt and "
        "its answer, which alone is trained on and evaluated; or chat, a list of messages rendered "
        "by the tokenizer's chat template, of which the assistant's alone are",
    )
    prompt_field: str = field("prompt", None, "prompt_answer: the field that holds the prompt")
    answer_field: str = field("completion", None, "prompt_answer: the field that holds the answer")
    separator: str = field(
        "", None, "prompt_answer: put between prompt and answer; part of the prompt"
    )
    messages_field: str = field(
        "messages",
        None,
        'chat: the field that holds the messages, each with a role and a content (or "from" and '
        '"value", as in ShareGPT)',
    )
    chat_template: str | None = field(
        None, None, "chat: a file with a Jinja template; none: the tokenizer's"
    )
    text_files: str = field(
        "paragraphs",
        either("paragraphs", "documents"),
        "content of a .txt file: paragraphs (documents separated by blank lines; a file that "
        "starts like JSON lines is read as JSON lines) or documents (a single document); line ends "
        "CR LF and CR are read as LF",
    )
    bad_documents: str = field(
        "stop",
        either("stop", "skip"),
        "what to do with malformed lines, invalid UTF-8, damaged archives or missing shards: stop "
        "if there are more than 0.1% of them, or skip all of them",
    )
    data_dir: str | None = field(
        None, None, "directory of prepared tensorflow-datasets; none: their default"
    )
    max_eval_sequences: int = field(
        0, at_least(0), "size of the fixed validation set, in sequences; 0: no limit"
    )
    prefetch: int = field(4, at_least(0), "batches prepared ahead of the step")
    threads: int = field(
        0, at_least(0), "threads that encode text and assemble batches; 0: one per core"
    )

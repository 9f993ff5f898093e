"""Small tables in the formats of GLUE, and a tokenizer of RoBERTa's kind."""

import json
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
from tokenizers.implementations import ByteLevelBPETokenizer

from loro_jax.glue import TASKS

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NOUNS = ["cat", "dog", "house", "river", "train", "letter"]
# One word per label, so that a small model learns a task in a few steps; the scores of STS-B are
# the numbers of such words.
SIGNS = ["awful", "lovely", "green"]
PLACES = {"train": 0, "validation": 1, "validation_matched": 2, "validation_mismatched": 3}


def sentences(task, split="train", count=48):
    """(texts, labels) of a task: a label is a word in the last text."""
    rng = np.random.default_rng((list(TASKS).index(task.name), PLACES[split]))
    texts, labels = [], []
    for i in range(count):
        first, last = (" ".join(rng.choice(NOUNS, 3)) for _ in range(2))
        if task.regression:
            label = float(i % 6)
            last = " ".join(["lovely"] * int(label) + ["awful"] * (5 - int(label)))
        else:
            label = i % task.outputs
            last = f"{last} {SIGNS[label]}"
        texts.append((first, last)[-len(task.texts) :])
        labels.append(label)
    return texts, labels


def columns_of(task):
    """Columns of a task as Hugging Face and tfds have them."""
    return [names[0] for names in task.texts]


def records(task, split, count=48):
    texts, labels = sentences(task, split, count)
    names = columns_of(task)
    return [
        {**dict(zip(names, text, strict=True)), "label": label, "idx": i}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


def write_jsonl(folder, task, count=48):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.validation):
        lines = [json.dumps(row) for row in records(task, split, count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_parquet(folder, task, count=48):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.validation):
        rows = records(task, split, count)
        half = len(rows) // 2
        for i, part in enumerate((rows[:half], rows[half:])):
            table = pyarrow.Table.from_pylist(part)
            pyarrow.parquet.write_table(table, folder / f"{split}-0000{i}-of-00002.parquet")


# Lines of GLUE's own files: header (none in CoLA), and a row of an index, texts and a label.
TSV = {
    "cola": (None, "gj04\t{label}\t*\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t{i}\t{i}0\t{a}\t{b}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{i}\tmain-news\tf\t2012\t{i}\tnone\tnone\t{a}\t{b}\t{label:.3f}",
    ),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "{i}\t1\t2\t{a}\t{b}\t{label}"),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse"
        "\tsentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{i}\t1\t1e\tfiction\t( x )\t( y )\t(ROOT x)\t(ROOT y)\t{a}\t{b}\t{name}\t{name}",
    ),
    "qnli": ("index\tquestion\tsentence\tlabel", "{i}\t{a}\t{b}\t{name}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "{i}\t{a}\t{b}\t{name}"),
}
NAMES = {
    "validation": "dev",
    "validation_matched": "dev_matched",
    "validation_mismatched": "dev_mismatched",
}


def tsv(task, split, count=48):
    """Text of GLUE's own file of a split."""
    header, row = TSV[task.name]
    lines = [] if header is None else [header]
    for i, (text, label) in enumerate(zip(*sentences(task, split, count), strict=True)):
        name = task.labels[label] if task.labels else ""
        lines.append(row.format(i=i, a=text[0], b=text[-1], label=label, name=name))
    return "\n".join(lines) + "\n"


def write_tsv(folder, task, count=48):
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.validation):
        text = tsv(task, split, count)
        (folder / f"{NAMES.get(split, split)}.tsv").write_text(text, encoding="utf-8")


def write_tokenizer(folder, as_json=True):
    """A byte-level BPE of the samples' words, as tokenizer.json or as vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    made = ByteLevelBPETokenizer()
    words = [f" {word} {word}" for word in (*NOUNS, *SIGNS)]
    made.train_from_iterator(
        words, vocab_size=330, min_frequency=1, special_tokens=SPECIAL, show_progress=False
    )
    if as_json:
        made.save(str(folder / "tokenizer.json"))
    else:
        made.save_model(str(folder))
    return folder


def prepare_tfds(folder, task, count=12):
    """Prepares a task as the dataset ``mini/NAME``, with the features of tfds' glue."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()

        class Mini(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=task.name, description="-"),)

            def _info(self):
                features = {name: tfds.features.Text() for name in columns_of(task)}
                label = np.float32
                if task.labels:
                    label = tfds.features.ClassLabel(names=list(task.labels))
                features |= {"label": label, "idx": np.int32}
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(name) for name in ("train", *task.validation)}

            def _generate_examples(self, split):
                yield from ((row["idx"], row) for row in records(task, split, count))

        builder = Mini(data_dir=str(folder), config=task.name, file_format="array_record")
        builder.download_and_prepare()

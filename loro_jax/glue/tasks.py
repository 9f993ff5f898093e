"""The tasks of GLUE: columns, labels and metrics (Wang et al. 2019, arXiv 1804.07461).

Columns have other names in GLUE's own files than in the copies of Hugging Face and
tensorflow-datasets; a task lists all of them. WNLI is left out, as in the paper.
"""

from __future__ import annotations

import dataclasses

Columns = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of GLUE.

    Attributes:
        name: name in a config.
        title: name in tables, and of its folder in GLUE's archive.
        folders: names that its folder has, in any case of letters.
        texts: names of the column of each text, one or two.
        label: names of the column of the label.
        labels: names of the labels, in the order of their numbers; empty: a number from 0 to 5.
        metrics: names of metrics (:mod:`loro_jax.glue.metrics`), the paper's first.
        validation: the validation splits.
        bare: columns of GLUE's own file, which has no header; empty: it has one.
    """

    name: str
    title: str
    folders: tuple[str, ...]
    texts: tuple[Columns, ...]
    label: Columns
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)
    bare: Columns = ()

    @property
    def outputs(self) -> int:
        """Outputs of a model's head: one per label; 1 for regression."""
        return len(self.labels) or 1

    @property
    def regression(self) -> bool:
        """Whether the label is a number."""
        return not self.labels


_ENTAILMENT = ("entailment", "not_entailment")

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            ("cola",),
            (("sentence",),),
            ("label",),
            ("unacceptable", "acceptable"),
            ("matthews",),
            bare=("source", "label", "mark", "sentence"),
        ),
        Task(
            "sst2",
            "SST-2",
            ("sst-2", "sst2"),
            (("sentence",),),
            ("label",),
            ("negative", "positive"),
            ("accuracy",),
        ),
        Task(
            "mrpc",
            "MRPC",
            ("mrpc",),
            (("sentence1", "#1 String"), ("sentence2", "#2 String")),
            ("label", "Quality"),
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
        ),
        Task(
            "stsb",
            "STS-B",
            ("sts-b", "stsb"),
            (("sentence1",), ("sentence2",)),
            ("label", "score"),
            (),
            ("pearson", "spearman"),
        ),
        Task(
            "qqp",
            "QQP",
            ("qqp",),
            (("question1",), ("question2",)),
            ("label", "is_duplicate"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
        ),
        Task(
            "mnli",
            "MNLI",
            ("mnli",),
            (("premise", "sentence1"), ("hypothesis", "sentence2")),
            ("label", "gold_label"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            validation=("validation_matched", "validation_mismatched"),
        ),
        Task(
            "qnli",
            "QNLI",
            ("qnli",),
            (("question",), ("sentence",)),
            ("label",),
            _ENTAILMENT,
            ("accuracy",),
        ),
        Task(
            "rte",
            "RTE",
            ("rte",),
            (("sentence1",), ("sentence2",)),
            ("label",),
            _ENTAILMENT,
            ("accuracy",),
        ),
    )
}

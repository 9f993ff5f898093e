import dataclasses

import pytest

from loro_jax.fields import (
    above,
    at_least,
    between,
    check,
    describe,
    either,
    field,
    help_lines,
    nested,
    one_of,
)

TABLE = {"a": 1}


@dataclasses.dataclass
class Inner:
    size: int | None = field(None, at_least(1), "how large")


@dataclasses.dataclass
class Outer:
    count: int = field(3, at_least(1), "how many")
    rate: float = field(0.5, above(0), "how fast")
    share: float = field(0.5, above(0, most=1), "of the whole")
    decay: float = field(0.9, at_least(0, below=1), "of an average")
    seed: int = field(0, between(0, 9), "of the draws")
    name: str = field("a", one_of(TABLE), "which entry")
    kind: str = field("x", either("x", "y"), "which kind")
    path: str | None = field(None, None, "a file")
    flag: bool = field(True, None, "a switch")
    inner: Inner = nested(Inner, "a group")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("count", 0, "at least 1, but is 0"),
        ("count", "many", "a whole number, at least 1, but is 'many'"),
        ("count", True, "a whole number, at least 1, but is True"),
        ("count", 1.5, "a whole number, at least 1, but is 1.5"),
        ("count", None, "a whole number, at least 1, but is None"),
        ("rate", 0.0, "above 0 and finite, but is 0.0"),
        ("rate", float("nan"), "above 0 and finite, but is nan"),
        ("rate", float("inf"), "above 0 and finite, but is inf"),
        ("share", 1.1, "above 0 and at most 1, but is 1.1"),
        ("decay", 1, "at least 0 and below 1, but is 1"),
        ("decay", float("nan"), "at least 0 and below 1, but is nan"),
        ("seed", 10, "between 0 and 9, but is 10"),
        ("name", "b", "one of a, but is 'b'"),
        ("name", 3, "one of a, but is 3"),
        ("kind", "z", '"x" or "y", but is \'z\''),
        ("path", 3, "text, but is 3"),
        ("flag", 1, "true or false, but is 1"),
    ],
)
def test_values_out_of_range_are_named(name, value, expected):
    with pytest.raises(ValueError, match=r"^of[.]") as error:
        check(dataclasses.replace(Outer(), **{name: value}), "of.")
    assert str(error.value) == f"of.{name} must be {expected}."


def test_values_in_range_pass():
    check(Outer(count=1, rate=1, share=1, decay=0, seed=9, kind="y", path="p", flag=False))
    check(Inner(size=2))
    with pytest.raises(ValueError, match="size must be at least 1"):
        check(Inner(size=0))


def test_a_table_may_grow(monkeypatch):
    monkeypatch.setitem(TABLE, "b", 2)
    check(Outer(name="b"))
    assert "one of a, b" in [one.expected for one in describe(Outer())]


def test_all_fields_are_described_with_defaults_and_groups():
    described = {one.name: one for one in describe(Outer())}
    assert [*described] == [
        *(one.name for one in dataclasses.fields(Outer) if one.name != "inner"),
        "inner.size",
    ]
    assert described["inner.size"].expected == "a whole number, at least 1, or none"
    assert described["flag"].default == "true"
    assert described["path"].default == "none"
    lines = help_lines(describe(Outer()))
    assert lines[:2] == ["  --config.count=3", "      how many (a whole number, at least 1)"]

"""Exchanges read from the text of compiled programs, in all the ways that XLA writes them."""

import pytest

from loro_jax.planning.collectives import read_collectives
from loro_jax.planning.hlo import read_instructions

PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {{
  %x = f32[8,4]{{1,0}} parameter(0)
  ROOT %y = {line}
}}
"""


def read(line, devices=8):
    return read_collectives(PROGRAM.format(line=line), devices)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        (
            "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            ((0, 4), (1, 5), (2, 6), (3, 7)),
        ),
        ("{}", (tuple(range(8)),)),
    ],
)
def test_groups_are_read_however_they_are_written(groups, expected):
    line = f"f32[8,4]{{1,0}} all-reduce(%x), replica_groups={groups}, to_apply=%add"
    (found,) = read(line)
    assert found.groups == expected


@pytest.mark.parametrize(
    ("line", "size", "sent"),
    [
        ("f32[8,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", 128, 192),
        ("f32[32,4]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}", 512, 384),
        ("f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add", 128, 96),
        ("(f32[8,4]{1,0}) all-to-all(%x), replica_groups=[2,4]<=[8]", 128, 96),
        ("f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,1},{2,2}}", 128, 128),
        (
            "(f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]",
            512,
            384,
        ),
    ],
)
def test_bytes_are_those_of_a_ring(line, size, sent):
    (found,) = read(line)
    assert (found.bytes, found.sent) == (size, sent)


@pytest.mark.parametrize(
    "line",
    [
        "f32[8,4]{1,0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add",
        "f32[8,4]{1,0} collective-permute(%x), source_target_pairs={{0,0},{1,1}}",
        "f32[8,4]{1,0} negate(%x)",
    ],
)
def test_what_nobody_sends_does_not_count(line):
    assert read(line) == []


NESTED = """
%few (x: f32[4]) -> f32[4] {
  ROOT %x = f32[4]{0} parameter(0)
}

%many (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %y = f32[4]{0} negate(%x)
  ROOT %z = f32[4]{0} custom-call(%y), custom_call_target="factor"
}

%body (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %which = s32[] constant(1)
  ROOT %y = f32[4]{0} conditional(%which, %x, %x), branch_computations={%few, %many}
}

%goes_on (x: f32[4]) -> pred[] {
  %x = f32[4]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %y = f32[4]{0} while(%x), condition=%goes_on, body=%body, backend_config={"known_trip_count":{"n":"24"}}
}
"""  # noqa: E501 - as XLA writes it


def test_loops_multiply_and_branches_are_chosen():
    (found,) = read_instructions(NESTED, ["custom-call"])
    assert found.times == 24
    assert read_instructions(NESTED, ["custom-call"], min) == []

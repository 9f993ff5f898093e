"""Which layers become low-rank, and with which rank."""

import numpy as np
import pytest

from loro_jax.layers.selection import resolve_rank, select

PATHS = ["blocks/0/attn/q", "blocks/0/mlp/up", "blocks/1/attn/q", "blocks/10/attn/q", "head"]
LAYERS = dict.fromkeys(PATHS)


@pytest.mark.parametrize(
    ("where", "selected"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("**", [0, 1, 2, 3, 4]),
        ("blocks", [0, 1, 2, 3]),
        ("blocks/**", [0, 1, 2, 3]),
        ("blocks/1", [2]),
        ("blocks/1*", [2, 3]),
        ("**/q", [0, 2, 3]),
        ("**/attn", [0, 2, 3]),
        ("blocks/*/attn/q", [0, 2, 3]),
        ("*/0/**/q", [0]),
        ("!head", [0, 1, 2, 3]),
        (["!head", "!**/mlp"], [0, 2, 3]),
        (["head", "blocks/**", "!**/q"], [1, 4]),
        (lambda path, layer: path.endswith("up"), [1]),
    ],
)
def test_patterns_match_whole_parts_of_paths(where, selected):
    assert select(LAYERS, where, "factorise") == [PATHS[i] for i in selected]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("bloc", r"factorise: where = 'bloc' matches no layer; its layers are: blocks/0/attn/q"),
        (["blocks", "!tail"], r"where = '!tail' matches no layer"),
        (["head", "!head"], r"excludes every layer that it includes"),
    ],
)
def test_what_matches_nothing_is_named(where, message):
    with pytest.raises(ValueError, match=message):
        select(LAYERS, where, "factorise")


def test_a_network_without_layers_says_so():
    with pytest.raises(ValueError, match="the network has none that can be factorised"):
        select({}, "**", "factorise")


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(8, 8), (64, 64), (np.int32(4), 4), (0.25, 16), (1.0, 64), (0.001, 1), (np.float64(0.5), 32)],
)
def test_ranks_are_numbers_or_shares_of_the_smaller_side(rank, expected):
    assert resolve_rank(rank, "head", (100, 64), "factorise") == expected


def test_ranks_may_depend_on_path_and_shape():
    def rank(path, shape):
        return None if path == "head" else shape[0] // 10

    assert resolve_rank(rank, "up", (100, 64), "factorise") == 10
    assert resolve_rank(rank, "head", (100, 64), "factorise") is None

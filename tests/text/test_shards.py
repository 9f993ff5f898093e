import numpy as np
import pytest

from loro_jax.errors import TrainingError
from loro_jax.text.encoding import check_ids, token_dtype
from loro_jax.text.shards import TokenShards, make_shard, map_shard


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 60_000, size=n) for n in rng.integers(1, 30, size=40)]


@pytest.mark.parametrize("cuts", [[40], [1, 39], [10, 0, 5, 25]])
@pytest.mark.parametrize("mapped", [False, True])
def test_shards_are_one_sequence_of_documents_and_one_stream(tmp_path, cuts, mapped):
    wanted = documents()
    shards, start = [], 0
    for number, count in enumerate(cuts):
        shard = make_shard(wanted[start : start + count], np.uint16, str(number))
        start += count
        if mapped:
            np.save(tmp_path / f"{number}.tokens.npy", shard.tokens)
            np.save(tmp_path / f"{number}.ends.npy", shard.ends)
            shard = map_shard(tmp_path / str(number))
        shards.append(shard)
    found = TokenShards(shards)
    stream = np.concatenate(wanted)
    assert (len(found), found.tokens) == (40, len(stream))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int32
    for start, stop in (
        (0, 1),
        (0, len(stream)),
        (17, 300),
        (len(stream) - 1, len(stream)),
        (5, 5),
    ):
        np.testing.assert_array_equal(found.read(start, stop), stream[start:stop])
        assert found.read(start, stop).dtype == np.int32
    np.testing.assert_array_equal(found.stream(), stream)
    np.testing.assert_array_equal(found.head(7, 3), wanted[7][:3])
    np.testing.assert_array_equal(found.head(7, 99), wanted[7])
    for outside in (-1, 40):
        with pytest.raises(IndexError):
            found[outside]


def test_no_documents():
    empty = TokenShards([make_shard([], np.uint16, "none")])
    assert (len(empty), empty.tokens, empty.stream().size) == (0, 0, 0)


def test_the_dtype_holds_every_id():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_ids_are_checked_at_both_ends():
    check_ids(np.array([0, 9]), 10, "here")
    for ids, wrong in (([3, 10, 2], 10), ([3, -1], -1)):
        with pytest.raises(TrainingError, match=rf"token id {wrong} in here .* \(0 to 9\)"):
            check_ids(np.array(ids), 10, "here")

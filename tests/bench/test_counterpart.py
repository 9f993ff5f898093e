"""The benchmarks beside PyTorch compare the same work; their times are nobody's assertion."""

import json

import pytest

from loro_jax.bench import __main__ as bench
from loro_jax.bench.counterpart import decoding, process
from loro_jax.errors import TrainingError


@pytest.fixture
def torch():
    pytest.importorskip("transformers", reason="the counterpart needs transformers")
    return pytest.importorskip("torch", reason="the counterpart needs torch")


@pytest.mark.slow
def test_steps_are_timed_in_turns_with_torch_from_the_same_weights(torch, tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["--models=tiny", "--counterpart=torch", "--rounds=3", "--batch_size=4"]
    assert not bench.main(["train_step", *arguments, "--sequence_length=8", f"--json={path}"])
    assert "| ratio" in capsys.readouterr().out
    full, low_rank = json.loads(path.read_text())["rows"]
    assert (full["method"], low_rank["method"]) == ("full", "lowrank")
    for row in (full, low_rank):
        assert row["loss"] == pytest.approx(row["loss torch"], rel=1e-4)
        assert row["least"] <= row["ratio"] <= row["most"]
        assert row["threads"] == process.threads()
    assert full["loss"] != pytest.approx(low_rank["loss"], rel=1e-6)
    assert full["speed-up"] == full["speed-up torch"] == full["FLOP ratio"] == 1
    expected = low_rank["tokens/s torch"] / full["tokens/s torch"]
    assert low_rank["speed-up torch"] == pytest.approx(expected)


@pytest.mark.slow
def test_texts_are_timed_in_turns_with_transformers_and_agree(torch, tmp_path):
    path = tmp_path / "result.json"
    arguments = ["--models=tiny", "--counterpart=transformers", "--rounds=1", "--prompt=5"]
    arguments += ["--new_tokens=6", "--batch_sizes=2", f"--json={path}"]
    assert not bench.main(["inference", *arguments])
    rows = json.loads(path.read_text())["rows"]
    assert [row["projections"] for row in rows] == ["full", "low_rank"]
    for row in rows:
        assert row["same tokens"] == 1
        assert row["ratio"] == pytest.approx(row["tokens/s"] / row["tokens/s transformers"])


@pytest.mark.parametrize("name", ["train_step", "inference"])
def test_without_torch_the_comparison_is_skipped_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(process, "missing", lambda: ["torch", "transformers"])
    option = f"--counterpart={'torch' if name == 'train_step' else 'transformers'}"
    assert not bench.main([name, option])
    assert capsys.readouterr().out == (
        f"skipped: {option} needs torch and transformers, not installed here (pip install)\n"
    )


def test_what_has_no_counterpart_is_refused(capsys):
    for arguments, message in (
        (["train_step", "--counterpart=torch", "--methods=galore"], "unknown method 'galore'"),
        (["inference", f"--models={decoding.SMOLLM2}"], "needs --counterpart=transformers"),
    ):
        with pytest.raises(SystemExit):
            bench.main(arguments)
        assert message in capsys.readouterr().err


def test_a_process_that_fails_says_why_in_one_line(torch):
    settings = {"work": "generation", "directory": "/nowhere"}
    with (
        process.torch_process(settings) as call,
        pytest.raises(TrainingError, match=r"exit status 1: .*/nowhere") as error,
    ):
        call()
    assert "\n" not in str(error.value)


def test_turns_alternate_after_a_call_of_each():
    called = []

    def ours():
        called.append("ours")
        return len(called)

    def theirs():
        called.append("theirs")
        return process.Call(2.0, 1.0, len(called))

    turns = process.in_turns(ours, theirs, rounds=2)
    assert called == ["ours", "theirs"] * 3
    assert turns.first == (1, 2)
    assert turns.ratios() == [2.0 / call.seconds for call in turns.ours]

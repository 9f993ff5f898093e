"""The benchmarks run, and compare like with like; their times are nobody's assertion."""

import argparse
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from loro_jax import exact_update, tables
from loro_jax.bench import __main__ as bench
from loro_jax.bench import (
    accelerator,
    exact_step,
    forward,
    levers,
    memory_fit,
    options,
    profile,
)
from loro_jax.planning import measured_step
from loro_jax.training.config import Config
from loro_jax.training.fields import apply_changes
from models import Llama, preset

TINY = preset("tiny")
# Of a layer's seven matrices: their entries, and the sums of their sides.
ENTRIES, SIDES = 4 * 32 * 32 + 3 * 32 * 48, 4 * 64 + 3 * (32 + 48)


def rows_of(name, path, *arguments):
    """Rows of a benchmark of the tiny model."""
    assert bench.main([name, "--models=tiny", f"--json={path}", *arguments]) == 0
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact_step", {"model", "pairs", "graph ms", "nearest ms", "naive jax / graph"}),
        ("approximate_step", {"model", "optimizer", "ms", "time / adamw", "temporaries MB"}),
    ],
)
@pytest.mark.slow
def test_a_benchmark_prints_a_table_and_writes_json(tmp_path, capsys, name, expected):
    path = tmp_path / "result.json"
    bench.main([name, "--models=tiny", "--rounds=1", f"--json={path}"])
    assert "| model" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert expected <= set(result["rows"][0])
    assert {"device", "date", "jax"} <= set(result["environment"])
    assert result["command"].startswith(f"python -m loro_jax bench {name}")


def test_slow_exact_steps_may_be_timed_with_fewer_layers(monkeypatch, tmp_path):
    def timed(candidates, rounds, pause):
        return dict.fromkeys(candidates, 0.001)

    monkeypatch.setattr(exact_step, "time_in_turns", timed)
    path = tmp_path / "result.json"
    arguments = ["exact_step", "--models=tiny", f"--json={path}", "--layers=4"]
    bench.main([*arguments, "--layers_of_others=2"])
    row = json.loads(path.read_text())["rows"][0]
    assert (row["pairs"], row["pairs of others"]) == (28, 14)
    assert [row[f"{name} ms"] for name in ("graph", "nearest", "gram")] == [1.0] * 3
    assert [row[f"{name} ms"] for name in ("svd", "naive jax")] == [2.0] * 2
    with pytest.raises(SystemExit):
        bench.main([*arguments, "--layers_of_others=0"])


@pytest.mark.slow
def test_the_benchmark_of_data(tmp_path, capsys):
    arguments = ["--rounds=1", "--steps=1", "--documents=300", "--batch_size=4"]
    arguments += ["--sequence_length=32", "--tokenizer=bytes"]
    rows = rows_of("data", tmp_path / "result.json", *arguments)
    assert "| source" in capsys.readouterr().out
    found = {(row["source"], row["what"]) for row in rows}
    formats = [".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet", "tfds"]
    assert {(name, "read and encode") for name in formats} <= found
    for name in ("shards", "mixed shards", "tfds"):
        assert {(name, "packed batches"), (name, "padded batches")} <= found
    assert "of it waiting for data" in rows[-1]["what"]


def test_the_benchmark_of_data_refuses_a_model_with_too_small_a_vocabulary(capsys):
    with pytest.raises(SystemExit):
        bench.main(["data", "--models=60m,tiny"])
    assert "tiny has 260 ids; expected at least 2048, those of --tokenizer=" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_benchmark_of_training_steps(tmp_path, capsys):
    arguments = ["--rounds=1", "--batch_size=2", "--sequence_length=16", "--methods=full,loro"]
    arguments += ["--set=lr_scale=0.5", "--set=exact_method=svd", "--remat=full=none,loro=rank"]
    rows = rows_of("train_step", tmp_path / "result.json", *arguments)
    assert "| model" in capsys.readouterr().out
    assert [row["method"] for row in rows] == ["full", "loro"]
    for row in rows:
        assert row["speed-up / FLOP ratio"] == pytest.approx(row["speed-up"] / row["FLOP ratio"])
        assert row["MFU"] > 0
        assert row["optimizer share"] < 1
    assert rows[0]["speed-up"] == rows[0]["FLOP ratio"] == 1
    assert rows[0]["FLOP ratio"] < rows[1]["FLOP ratio"]
    assert rows[0]["state MB"] > rows[1]["state MB"]
    assert all(row["held MB"] >= row["state MB"] + row["temporaries MB"] for row in rows)
    assert bench.main(["train_step", "--models=tiny", *arguments, "--remat=full=none"]) == 1
    assert "--remat=full=none has no entry for 'loro'" in capsys.readouterr().err


def test_the_benchmark_of_training_steps_names_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        bench.main(["train_step", "--methods=lorro"])
    assert "unknown method 'lorro'" in capsys.readouterr().err
    assert bench.main(["train_step", "--set=lr_scael=0.5"]) == 1
    assert "error: --set lr_scael=0.5: expected FIELD=VALUE" in capsys.readouterr().err


@pytest.mark.slow
def test_plans_of_both_models_stand_side_by_side(tmp_path, capsys):
    arguments = ["--meshes=1x1x1", "--batch_size=8", "--micro_batch=4", "--sequence_length=16"]
    dense, low_rank = rows_of("plan", tmp_path / "plan.json", *arguments, "--set=exact_method=svd")
    assert (dense["method"], low_rank["method"]) == ("full", "loro")
    assert dense["micro-batches"] == 2
    for name in ("parameters M", "state GB", "TFLOP"):
        assert low_rank[name] < dense[name]
    assert dense["sent GB"] == low_rank["sent GB"] == 0
    assert bench.main(["plan", "--models=tiny", "--meshes=2x2"]) == 1
    assert "--meshes: expected sizes such as 2x4x1, but found '2x2'" in capsys.readouterr().err


@pytest.mark.slow
def test_cost_is_counted_for_all_and_measured_for_one(tmp_path, capsys):
    arguments = ["--ranks=8,4", "--sequence_lengths=16,32", "--tokens=1024", "--rounds=1"]
    arguments += ["--measure=tiny", "--measure_batch=2", f"--plot={tmp_path / 'plot.png'}"]
    path = tmp_path / "cost.json"
    rows = rows_of("cost", path, *arguments)
    assert [(row["rank"], row["sequence"]) for row in rows] == [(4, 16), (4, 32), (8, 16), (8, 32)]
    narrow, _, wide, _ = rows
    assert narrow["dense / it"] > wide["dense / it"] > 1
    assert narrow["exact, K=50"] == pytest.approx(4 * narrow["exact, K=200"])
    # Seven pairs a layer, ten tall and thirty small products each.
    exact = 2 * (10 * 8**2 * SIDES + 7 * 30 * 2 * 8**3)
    assert wide["exact, K=50"] == pytest.approx(exact / 50 / 1024 / (1e6 * wide["MFLOPs/token"]))
    measured = json.loads(path.read_text())["measured"]
    assert [row["rank"] for row in measured] == ["dense", "4", "8"]
    assert (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        bench.main(["cost", "--models=tiny", "--plot=x.png"])
    assert "--plot: needs --measure=MODEL" in capsys.readouterr().err


@pytest.mark.slow
def test_projections_of_one_input_are_timed_together_and_each(tmp_path):
    path = tmp_path / "together.json"
    rows = rows_of("together", path, "--rounds=1", "--tokens=64")
    assert [row["projections"] for row in rows] == ["q, k, v", "gate, up"]
    for row in rows:
        assert row["each / together"] == pytest.approx(row["each ms"] / row["together ms"])


@pytest.mark.slow
def test_batches_are_read_for_logits_and_for_scores(tmp_path, capsys):
    arguments = ["--rounds=1", "--batch_sizes=1,2", "--lengths=8"]
    rows = rows_of("forward", tmp_path / "forward.json", *arguments)
    found = [(row["batch"], row["what"], row["projections"]) for row in rows]
    kinds = [(what, kind) for what in forward.WHAT for kind in ("full", "low_rank")]
    assert found == [(batch, *kind) for batch in (1, 2) for kind in kinds]
    full, low_rank = rows[:2]
    assert full["FLOP ratio"] == 1
    head, attention = 260 * 32, 2 * 8 * 32
    matrices, factors = head + attention + 2 * ENTRIES, head + attention + 2 * 8 * SIDES
    assert low_rank["FLOP ratio"] == pytest.approx(matrices / factors)
    assert low_rank["memory MB"] < full["memory MB"]
    for bad in ("--batch_sizes=0", "--lengths=x", "--rank=33", "--dtype=int8"):
        with pytest.raises(SystemExit):
            bench.main(["forward", "--models=tiny", *arguments, bad])
        assert "error: " in capsys.readouterr().err


def test_scores_are_the_log_likelihoods_of_the_logits():
    model = Llama(dataclasses.replace(TINY, loss_chunk_size=4), nnx.Rngs(0))
    logits, score = (forward._prepare(model, what, 2, 6).run() for what in forward.WHAT)
    ids = np.random.default_rng(0).integers(260, size=(2, 7))
    chosen = np.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], axis=-1)
    assert float(score) == pytest.approx(float(chosen.sum()), rel=1e-5)


@pytest.mark.slow
def test_levers_compute_the_same_step(tmp_path, capsys):
    # None of its steps is exact: without any, each compiles in half of the time.
    arguments = ["--rounds=1", "--batch_size=8", "--sequence_length=16", "--set=exact_every=0"]
    arguments.append("--only=buffers not donated")
    rows = rows_of("levers", tmp_path / "levers.json", *arguments)
    by_name = {row["lever"]: row for row in rows}
    assert by_name["base"]["time / base"] == by_name["base"]["memory / base"] == 1
    assert by_name["buffers not donated"]["memory / base"] > 1
    config = Config(
        batch_size=8, sequence_length=16, exact_every=0, model=dataclasses.replace(TINY)
    )
    losses = {}
    for name, lever in levers.levers(config).items():
        made = dataclasses.replace(config, model=dataclasses.replace(TINY))
        apply_changes(made, lever.changes)
        step = levers._prepare(made, lever).step
        losses[name] = [float(step()["loss"]) for _ in range(2)]
    assert losses["base"][1] < losses["base"][0]
    for name, found in losses.items():
        tolerance = 1e-2 if name == "bfloat16 activations" else 1e-5
        np.testing.assert_allclose(found, losses["base"], rtol=tolerance, err_msg=name)
    with pytest.raises(SystemExit):
        bench.main(["levers", "--models=tiny", "--only=magic"])
    assert "unknown 'magic'; expected some of base, buffers" in capsys.readouterr().err


def test_results_are_json_that_strict_readers_take(tmp_path, capsys):
    path = tmp_path / "result.json"
    rows = [{"peak": float("nan"), "rate": float("inf"), "batch": 2, "share": 0.5}]
    tables.report(rows, argparse.Namespace(json=str(path), command="command", more={}))

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)["rows"]
    assert found == [{"peak": None, "rate": None, "batch": 2, "share": 0.5}]
    assert "| nan " in capsys.readouterr().out


def test_a_result_is_written_whole_or_not_at_all(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text("before")
    with pytest.raises(TypeError):
        tables.report([{"rate": object()}], argparse.Namespace(json=str(path), command="", more={}))

    def fill_the_disk():
        with tables.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fill_the_disk()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SystemExit):
        bench.main(["exact_step", f"--json={tmp_path / 'none' / 'result.json'}"])
    assert "there is no directory" in capsys.readouterr().err


def test_results_say_what_the_environment_asks_of_libraries(monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = tables.environment()
    assert found["OPENBLAS_NUM_THREADS"] == "1"
    assert "GLIBC_TUNABLES" not in found


@pytest.mark.slow
def test_what_fits_is_what_a_compiled_step_says(tmp_path):
    arguments = ["--memory=0.001,0.01", "--sequence_length=16", "--methods=full"]
    arguments += ["--dtype=float32", "--param_dtype=float32", "--remat=none"]
    (row,) = rows_of("memory_fit", tmp_path / "fit.json", *arguments)
    few, many = row["batch in 0.001 GB"], row["batch in 0.01 GB"]
    assert 0 <= few < many
    # The batch it names, compiled, fits; one of a sequence more does not. (How much is left over is
    # up to the compiler: versions differ in what a sequence takes.)
    given = argparse.Namespace(
        sequence_length=16, dtype="float32", param_dtype="float32", remat="none", set=[]
    )
    held = [sum(memory_fit._compiled("tiny", "full", n, given)[1:]) for n in (many, many + 1)]
    assert held[0] <= 1.02e7
    assert held[1] > 0.98e7


@pytest.mark.slow
def test_the_benchmark_of_serving(tmp_path, capsys):
    caches = ["full", "values", "latent"]
    arguments = ["--rounds=1", "--batch_sizes=1,2", "--prompt=7", f"--caches={','.join(caches)}"]
    rows = rows_of("inference", tmp_path / "result.json", *arguments)
    found = [(row["batch"], row["projections"]) for row in rows]
    kinds = ["full", *(f"low_rank, {cache} cache" for cache in caches)]
    assert found == [(batch, kind) for batch in (1, 2) for kind in kinds]
    full, low_rank, values, latent = rows[4:]
    # Head and two layers; their keys and values of 2 rows of 8 tokens.
    matrices, factors = 260 * 32 + 2 * ENTRIES, 260 * 32 + 2 * 8 * SIDES
    assert full["weights MB"] == pytest.approx(4e-6 * matrices)
    assert low_rank["weights MB"] == pytest.approx(4e-6 * factors)
    cache = 2 * 2 * 2 * 8 * 32
    assert full["cache MB"] == low_rank["cache MB"] == pytest.approx(4e-6 * cache)
    assert low_rank["byte ratio"] == pytest.approx((matrices + cache) / (factors + cache))
    attention = 2 * 2 * 32 * 8
    expected = (matrices + attention) / (factors + attention)
    assert low_rank["FLOP ratio"] == pytest.approx(expected)
    # In place of values' 32 entries, and of keys' 32, latents' 8.
    assert values["cache MB"] == pytest.approx(4e-6 * 2 * 2 * 8 * (32 + 8))
    assert latent["cache MB"] == pytest.approx(4e-6 * 2 * 2 * 8 * (8 + 8))
    of_latents = 2 * 8 * (32 + 4 * 8 + 32 * 8)  # scores, sums by 4 heads, keys made again
    expected = (matrices + attention) / (factors + of_latents)
    assert latent["FLOP ratio"] == pytest.approx(expected)
    for bad in ("--batch_sizes=0", "--prompt=1024", "--rank=33", "--caches=half"):
        with pytest.raises(SystemExit):
            bench.main(["inference", "--models=tiny", *arguments, bad])


def test_the_transcription_computes_what_ours_does():
    for B, A, dB, dA in exact_step.make_pairs([(40, 32, 8), (32, 40, 8)]):
        ours = exact_update(jnp.array(B), jnp.array(A), dB, dA, exact_step.RATE, method="svd")
        theirs = jax.jit(exact_step.naive_jax)(B, A, dB, dA)
        np.testing.assert_allclose(ours[0] @ ours[1], theirs[0] @ theirs[1], atol=1e-4)


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_unknown_benchmarks_are_named(arguments, capsys):
    assert bench.main(arguments) == 2
    assert "approximate_step,cost,data,exact_step" in capsys.readouterr().err


def test_the_nearest_benchmark_is_suggested(capsys):
    assert bench.main(["exactstep"]) == 2
    assert "did you mean 'exact_step'?" in capsys.readouterr().err


def test_unknown_models_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.main(["exact_step", "--models=61m"])
    assert "unknown model '61m'" in capsys.readouterr().err


@pytest.mark.slow
def test_all_measurements_of_an_accelerator_go_on_where_they_stopped(monkeypatch, tmp_path, capsys):
    """Two benchmarks, of which one fails; the same command again does only what is missing."""
    good = ["stability", "--help"]  # prints and ends well, without a result of its own
    monkeypatch.setattr(accelerator, "MEASUREMENTS", {"good": good, "bad": ["no_such_benchmark"]})
    (tmp_path / "good.partial").write_text("{}")
    for seen in ("good: done", "good: is there"):
        assert bench.main(["accelerator", f"--out={tmp_path}"]) == 1
        out, error = capsys.readouterr()
        assert error == f"error: not measured: bad; see their logs in {tmp_path}\n"
        assert seen in out
        assert "bad: failed with status" in out
    assert (tmp_path / "bad.log").read_text().startswith("usage: python -m loro_jax bench")
    assert bench.main(["accelerator", f"--out={tmp_path}", "--only=bad", "--seconds=0"]) == 1
    assert "bad: no time left" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main(["accelerator", f"--out={tmp_path}", "--only=other"])
    assert "unknown 'other'; expected some of good, bad" in capsys.readouterr().err


@pytest.mark.parametrize("name", accelerator.MEASUREMENTS)
def test_measurements_of_an_accelerator_are_benchmarks_with_known_options(name, monkeypatch):
    """Each is parsed as it would be; none is run."""
    module, *arguments = accelerator.MEASUREMENTS[name]

    class ParsedError(Exception):
        pass

    def parse(*given):
        options.parse_options(*given)
        raise ParsedError

    parser_of = "train_step" if module == "profile" else module
    monkeypatch.setattr(f"loro_jax.bench.{parser_of}.parse_options", parse)
    with pytest.raises(ParsedError):
        bench.main([module, *arguments])


def test_a_profile_reads_traces_of_a_gpu():
    """Kernels say their operation; copies by the driver only their scope."""
    known = {"loop_pad_fusion": ("mlp", "arithmetic"), "custom-call.7": ("attention", "products")}
    scope = "jit(train_step)/while/body/transpose(jvp(attention))/while"
    for name, stats, expected in (
        ("loop_pad_fusion", {"hlo_op": "loop_pad_fusion"}, ("mlp", "arithmetic")),
        ("nvjet_sm90_tst_256x128", {"hlo_op": "custom-call.7"}, ("attention", "products")),
        ("MemcpyD2D", {"hlo_op": "slice_fusion.3", "name": scope}, ("attention", "moves")),
        ("Memset 3", {"hlo_op": "bwd.8"}, ("rest", "moves")),
        ("cuLaunchKernel", {}, None),
        ("ThunkExecutor", {"hlo_op": "call.3"}, None),
    ):
        assert profile.classify_event(name, stats, known) == expected


@pytest.mark.slow
def test_a_profile_knows_parts_and_kinds_of_what_is_compiled(tmp_path):
    config = Config(
        batch_size=2, sequence_length=16, exact_method="svd", model=dataclasses.replace(TINY)
    )
    found = profile.classify(measured_step.prepare(config).hlo())
    assert {part for part, _ in found.values()} == set(profile.PARTS)
    assert {kind for _, kind in found.values()} == set(profile.KINDS)
    for part in ("attention", "mlp", "loss"):
        assert (part, "products") in found.values()
    arguments = ["--methods=full,loro", "--rounds=2", "--batch_size=2", "--sequence_length=16"]
    rows = rows_of("profile", tmp_path / "profile.json", *arguments, "--set=exact_method=svd")
    assert [(row["method"], row["part"]) for row in rows] == [
        (method, part) for method in ("full", "loro") for part in profile.PARTS
    ]
    for method in ("full", "loro"):
        shares = [row["share"] for row in rows if row["method"] == method]
        assert sum(shares) == pytest.approx(1)
        assert all(row["products ms"] > 0 for row in rows if row["part"] in ("attention", "mlp"))

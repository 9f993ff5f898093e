"""Programs compiled for accelerators that are not here."""

import dataclasses

import pytest

from loro_jax.errors import TrainingError
from loro_jax.planning import plan as plans
from loro_jax.planning import topologies
from loro_jax.planning.accelerators import ACCELERATORS
from loro_jax.planning.flops import flops_per_token
from loro_jax.planning.kernels import PARTS
from loro_jax.training.config import Config, MeshConfig
from models.llama import LlamaConfig
from tests.training import runs

MODEL = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=2,
    rank=8,
    dtype="bfloat16",
)
CONFIG = Config(
    model=MODEL, batch_size=8, sequence_length=32, gradient_accumulation=2, exact_every=0
)


def needs_compiler(name):
    command = topologies.missing(name)
    return pytest.mark.skipif(command is not None, reason=f"no compiler for it: {command}")


@pytest.fixture
def texts(monkeypatch):
    """The texts of the programs that are compiled in a test, for devices that are not here."""
    found = []
    read = plans.read_kernels
    monkeypatch.setattr(plans, "read_kernels", lambda x, *args: found.append(x) or read(x, *args))
    # The compilers may be of another version of XLA, which does not know all options for CPU.
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return found


def test_there_is_a_datasheet_for_each():
    assert set(topologies.NAMES) == set(ACCELERATORS)


@needs_compiler("h100")
def test_a_step_for_an_h100_takes_its_kernels(texts):
    plan = plans.make_plan(CONFIG, 1, "h100")
    (text,) = texts
    # Chosen for the device that is compiled for, not for the one that compiles.
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "__cublas$lt$matmul" in text
    check(plan)


@needs_compiler("v5p")
def test_a_step_for_a_tpu_computes_what_the_model_needs(texts):
    plan = plans.make_plan(CONFIG, 1, "v5p")
    assert "T(8,128)" in texts[0]
    # As on a CPU: attention is computed whole and counted causal, and its two products are computed
    # again in the backward pass.
    one_product = MODEL.num_layers * 2 * 32 * 64 * plan.tokens
    assert sum(kernel.flops for kernel in plan.kernels) == plan.model_flops + 5 * one_product
    check(plan)


def check(plan):
    assert plan.model_flops == plan.tokens * flops_per_token(CONFIG)
    assert sum(kernel.flops for kernel in plan.kernels) >= plan.model_flops
    assert plan.state_bytes > 3 * 4 * plan.parameters  # parameters and two moments
    assert plan.temporary_bytes > 0
    assert {kernel.part for kernel in plan.kernels} == set(PARTS)
    assert (plan.sent, plan.sent_more) == (0, 0)
    computing, exchanging = plan.seconds(ACCELERATORS[plan.accelerator])
    assert 0 < computing < 1e-3
    assert exchanging == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_compiler(name)) for name in topologies.NAMES]
)
def test_devices_of_all_kinds_share_a_step(name, texts):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    plan = plans.make_plan(dataclasses.replace(CONFIG, mesh=mesh), 8, name)
    assert plan.devices == 8
    kinds = {exchange.kind for exchange in plan.exchanges}
    assert {"all-reduce", "all-gather"} <= kinds
    # Along `data` and `fsdp` each device has a quarter of the tokens, along `tensor` it shares all
    # products but those of the factors next to the rank.
    executed = sum(kernel.flops for kernel in plan.kernels)
    assert plan.model_flops / 8 < executed < plan.model_flops / 3


@pytest.mark.parametrize(
    ("name", "count", "topology"),
    [
        ("v5p", 1, "v5p:2x2x1"),
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 5, "v5p:2x2x2"),
        ("v5p", 16, "v5p:2x2x4"),
        ("v5p", 512, "v5p:8x8x8"),
        ("v5e", 1, "v5e:1x1"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
    ],
)
def test_a_mesh_takes_the_smallest_topology_that_holds_it(name, count, topology):
    assert topologies.topology_of(name, count) == topology


def test_more_chips_than_a_pod_has_are_an_error(monkeypatch):
    monkeypatch.setattr(topologies, "missing", lambda name: None)
    with pytest.raises(TrainingError, match="--accelerator=v5e: a pod has 256 chips, not 1000"):
        topologies.make_target("v5e", 1000)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100", "--accelerator=h100: its compiler is not installed; pip install 'jax[cuda13]'."),
        ("v6e", "--accelerator=v6e: its compiler is not installed; pip install 'jax[tpu]'."),
        ("b9000", "--accelerator=b9000: expected one of h100, h200, a100, v5p, v5e, v6e."),
    ],
)
def test_what_is_not_installed_is_named_in_one_line(monkeypatch, tmp_path, name, message):
    monkeypatch.setattr(topologies, "_is_installed", lambda package: False)
    flags = runs.flags(tmp_path / "run", tmp_path / "no_corpus.txt")
    status, output = runs.run("--dry_run", "--devices=1", f"--accelerator={name}", *flags)
    assert (status, output) == (1, f"error: {message}\n")
    assert not (tmp_path / "run").exists()


def test_a_run_has_no_accelerator_but_those_that_are_there(tmp_path):
    flags = runs.flags(tmp_path / "run", tmp_path / "no_corpus.txt")
    status, output = runs.run("--accelerator=h100", *flags)
    assert status == 1
    assert output.startswith("error: --accelerator=h100 is for --dry_run")


def test_options_in_the_environment_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert topologies._options() == {"xla_gpu_enable_triton_gemm": False}

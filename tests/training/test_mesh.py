"""The same run on one device and on four simulated ones."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from loro_jax.training.config import Config, MeshConfig
from loro_jax.training.errors import TrainingError
from loro_jax.training.mesh import check_batch, make_mesh, tree_shardings
from tests.training import runs

FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_device")
    source = runs.corpus(folder)
    workdir = folder / "run"
    status, output = runs.finish(runs.start(*runs.flags(workdir, source, steps=24)))
    assert status == 0, output
    return source, runs.rows(workdir)


def run_on_four(workdir, source, **mesh):
    mesh = {f"mesh.{axis}": size for axis, size in mesh.items()}
    process = runs.start(*runs.flags(workdir, source, steps=24, **mesh), **FOUR)
    status, output = runs.finish(process, timeout=300)
    assert status == 0, output
    return runs.rows(workdir)


def assert_same_losses(reference, found):
    for one, other in zip(reference, found, strict=True):
        key = "loss" if "loss" in one else "val_loss"
        np.testing.assert_allclose(one[key], other[key], rtol=1e-4)


def test_split_parameters_give_the_losses_of_one_device(one_device, tmp_path):
    source, reference = one_device
    assert_same_losses(reference, run_on_four(tmp_path / "run", source, data=1, fsdp=2, tensor=2))


def test_a_split_batch_does_too_and_its_run_goes_on_on_another_mesh(one_device, tmp_path):
    source, reference = one_device
    workdir = tmp_path / "run"
    assert_same_losses(reference, run_on_four(workdir, source, data=-1, fsdp=2))
    status, output = runs.finish(runs.start(*runs.flags(workdir, source, steps=24)))
    assert status == 0, output
    assert "from step 24" in output


def spec_of(mesh_shape, path, shape):
    mesh = AbstractMesh(mesh_shape, ("data", "fsdp", "tensor"))
    tree = jax.ShapeDtypeStruct(shape, np.float32)
    for name in reversed(path):
        tree = {name: tree}
    (sharding,) = jax.tree.leaves(tree_shardings(mesh, tree))
    return sharding.spec


def test_projections_are_split_where_their_products_need_no_exchange():
    column = ("blocks", "attention", "q")
    row = ("blocks", "mlp", "down")
    shape = (1, 2, 2)
    assert spec_of(shape, (*column, "B"), (3, 64, 8)) == PartitionSpec(None, "tensor", "fsdp")
    assert spec_of(shape, (*column, "A"), (3, 8, 64)) == PartitionSpec(None, None, "fsdp")
    assert spec_of(shape, (*row, "B"), (3, 64, 8)) == PartitionSpec(None, "fsdp", None)
    assert spec_of(shape, (*row, "A"), (3, 8, 96)) == PartitionSpec(None, "fsdp", "tensor")
    assert spec_of(shape, ("embedding",), (260, 64)) == PartitionSpec("tensor", "fsdp")
    assert spec_of((4, 1, 1), ("embedding",), (260, 64)) == PartitionSpec("tensor", "fsdp")


def test_sizes_that_do_not_divide_stay_whole():
    spec = spec_of((1, 2, 2), ("head", "W"), (261, 63))
    assert spec == PartitionSpec(None, None)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (1, 0, 1), (-1, 2, 1)])
def test_meshes_that_do_not_fit_are_named(sizes):
    with pytest.raises(TrainingError, match=r"config.mesh = .* 1 device"):
        make_mesh(MeshConfig(*sizes))


def test_batches_that_do_not_split_are_named():
    mesh = AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(TrainingError, match="6 sequences do not split over 4 devices"):
        check_batch(Config(batch_size=12, gradient_accumulation=2), mesh)

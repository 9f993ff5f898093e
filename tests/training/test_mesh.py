"""Where parameters lie on a mesh, and meshes that can't be."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from loro_jax.errors import TrainingError
from loro_jax.training.config import Config, MeshConfig
from loro_jax.training.mesh import check_batch, make_mesh, tree_shardings


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

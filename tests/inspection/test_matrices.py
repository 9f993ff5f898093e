"""Singular values without products, against SVDs of products."""

import jax.numpy as jnp
import numpy as np
import pytest

from loro_jax.inspection import matrices_of, small_tables


def pair(seed=0, m=12, r=4, n=9, layers=3):
    rng = np.random.default_rng(seed)
    return {"B": rng.normal(size=(layers, m, r)), "A": rng.normal(size=(layers, r, n))}


def by_part(found):
    return {(one.name, one.part, one.layer): one for one in found}


def test_values_are_those_of_the_svd_of_the_product():
    q, W = pair(), np.random.default_rng(1).normal(size=(3, 7, 5))
    params = {"blocks": {"attention": {"q": q}, "mlp": {"up": {"W": W}}}, "head": {"W": W[0]}}
    found = by_part(matrices_of(params))
    assert len(found) == 3 * 3 + 3
    for layer in range(3):
        dense = {"B A": q["B"][layer] @ q["A"][layer], "B": q["B"][layer], "A": q["A"][layer]}
        for part, matrix in dense.items():
            one = found["attention/q", part, layer]
            expected = np.linalg.svd(matrix, compute_uv=False)[:4]
            assert one.shape == matrix.shape
            np.testing.assert_allclose(one.singular_values, expected, rtol=1e-10)
            measures = one.measures()
            assert measures["condition"] == pytest.approx(expected[0] / expected[-1])
            assert measures["norm"] == pytest.approx(np.linalg.norm(matrix))
            stable = (np.linalg.norm(matrix) / np.linalg.norm(matrix, 2)) ** 2
            assert measures["stable_rank"] == pytest.approx(stable)
            squares = np.cumsum(expected**2) / np.sum(expected**2)
            assert measures["rank_99"] == np.sum(squares < 0.99) + 1
        values = found["mlp/up", "W", layer].singular_values
        np.testing.assert_allclose(values, np.linalg.svd(W[layer], compute_uv=False))


def test_an_ill_conditioned_product_keeps_its_smallest_values():
    """Through r x r matrices in float64, a condition number of 1e10 is right to five digits."""
    rng = np.random.default_rng(0)
    U, V = (np.linalg.qr(rng.normal(size=(20, 3)))[0] for _ in range(2))
    sizes = np.array([1e5, 1.0, 1e-5])
    q = {"B": (U * np.sqrt(sizes))[None], "A": (V * np.sqrt(sizes)).T[None]}
    (one, *_) = matrices_of({"blocks": {"q": q}})
    np.testing.assert_allclose(one.singular_values, sizes, rtol=1e-5)


def test_padding_does_not_count():
    q = pair(r=2, layers=2)
    padded = {
        "B": np.pad(q["B"], ((0, 0), (0, 0), (0, 3))),
        "A": np.pad(q["A"], ((0, 0), (0, 3), (0, 0))),
    }
    expected = small_tables({"blocks": {"q": q}})
    assert small_tables({"blocks": {"q": padded}}) == expected
    # A zero in one of the factors is no padding: the product has no finite condition number.
    q["B"][0, :, 1] = 0
    found = small_tables({"blocks": {"q": q}})["q B A"]["condition"]
    assert found[0] is None or found[0] > 1e14
    assert found[1] == expected["q B A"]["condition"][1]


def test_what_is_not_finite_or_zero_is_said_and_not_raised():
    q = pair(layers=2)
    q["B"][0, 0, 0] = np.nan
    q["B"][1] = 0
    found = small_tables({"blocks": {"q": q}})
    assert found["q B A"] == {"condition": [None] * 2, "norm": [None, 0], "stable_rank": [None, 0]}


def test_adapters_and_other_kinds_are_found_by_their_arrays():
    q = pair()
    adapted = {"base": {"W": np.ones((3, 12, 9))}, "adapter": q}
    found = matrices_of({"blocks": {"q": adapted, "o": {**q, "columns": np.ones((3, 4, 4), int)}}})
    assert {(one.name, one.part) for one in found} == {
        *((name, part) for name in "qo" for part in ("B A", "B", "A")),
        ("q", "W"),
    }
    # Between these factors stand singular values or gates: B A is not the product.
    for between in ("S", "E", "gate"):
        split = {**q, between: np.ones((3, 4))}
        assert {one.part for one in matrices_of({"blocks": {"q": split}})} == {"B", "A"}


def test_narrow_dtypes_are_read():
    q = {name: jnp.asarray(value, jnp.bfloat16) for name, value in pair().items()}
    wide = {name: np.asarray(value, np.float64) for name, value in q.items()}
    assert small_tables({"blocks": {"q": q}}) == small_tables({"blocks": {"q": wide}})

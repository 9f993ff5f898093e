"""The worked examples run, and what they train learns."""

import matplotlib
import pytest

matplotlib.use("Agg")


@pytest.mark.slow
def test_a_vision_transformer_of_low_rank_learns_digits(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from loro_jax.layers.examples import digits

    curves = digits.main(str(tmp_path / "digits.png"), steps=60)
    # One in ten by chance.
    assert all(curve[-1] > 0.5 for curve in curves.values()), curves
    assert (tmp_path / "digits.png").stat().st_size > 5000
    assert "blocks/1/attention/query" in capsys.readouterr().out


@pytest.mark.slow
def test_a_truncated_network_is_healed():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from loro_jax.layers.examples import heal

    found = heal.main(steps=100)
    assert found["truncated"] < found["healed"] - 0.05
    assert found["merged"] == pytest.approx(found["healed"], abs=0.01)

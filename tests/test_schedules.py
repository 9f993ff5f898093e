import chex
import numpy as np
import optax
import pytest

from loro_jax import warmup_cosine, with_restarts
from loro_jax.schedules import warmup_linear

both = chex.variants(with_jit=True, without_jit=True)


class SchedulesTest(chex.TestCase):
    """Read by Python numbers, and within a compiled program."""

    @both
    def test_warmup_and_cosine_meet_and_end_where_they_should(self):
        schedule = self.variant(warmup_cosine(0.01, 10_000, 1_000))
        rates = np.array([schedule(step) for step in range(0, 10_001, 100)])
        np.testing.assert_allclose(rates[0], 0.001, rtol=1e-6)
        np.testing.assert_allclose(rates[10], 0.01, rtol=1e-6)
        np.testing.assert_allclose(rates[-1], 0.001, rtol=1e-5)
        assert np.all(np.diff(rates[:11]) > 0)
        assert np.all(np.diff(rates[10:]) < 0)
        middle = 0.001 + 0.009 * 0.5 * (1 + np.cos(np.pi * 0.5))
        np.testing.assert_allclose(schedule(5_500), middle, rtol=1e-5)

    @both
    def test_no_warmup(self):
        assert float(self.variant(warmup_cosine(0.01, 100, 0))(0)) == pytest.approx(0.01)

    @both
    def test_linear_decay_after_a_warmup(self):
        schedule = self.variant(warmup_linear(0.01, 1_000, 200, initial_ratio=0.1))
        found = [float(schedule(step)) for step in (0, 100, 200, 600, 1_000)]
        np.testing.assert_allclose(found, [0.001, 0.0055, 0.01, 0.005, 0], atol=1e-7)
        whole = self.variant(warmup_linear(0.01, 1_000, 0, final_ratio=0.1))
        found = [float(whole(step)) for step in (0, 500, 1_000)]
        np.testing.assert_allclose(found, [0.01, 0.0055, 0.001], atol=1e-7)

    @both
    def test_restarts_climb_back_to_the_schedule_after_each_exact_step(self):
        base = optax.linear_schedule(1.0, 0.0, 1_000)
        schedule = self.variant(with_restarts(base, every=50, warmup_steps=5))
        for step in (0, 3, 49):  # before the first exact step
            np.testing.assert_allclose(schedule(step), base(step), rtol=1e-6)
        for exact in (50, 400):
            found = [float(schedule(exact + i) / base(exact + i)) for i in range(7)]
            np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.6, 0.8, 1, 1], atol=1e-6)

    @both
    def test_no_restart_warmup(self):
        schedule = self.variant(with_restarts(0.5, every=10, warmup_steps=0))
        assert [float(schedule(step)) for step in (9, 10, 11)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "make",
    [
        lambda: warmup_cosine(0.1, 10, 11),
        lambda: warmup_cosine(0.1, 10, -1),
        lambda: warmup_linear(0.1, 10, 11),
        lambda: with_restarts(0.1, 0),
        lambda: with_restarts(0.1, 5, -1),
    ],
)
def test_bad_lengths_are_named(make):
    with pytest.raises(ValueError, match=r"must be between|expected every"):
        make()

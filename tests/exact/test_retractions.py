"""Both methods of the exact step in float32 against a float64 truncated SVD, everywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from loro_jax import LowRank, exact_update, loro
from loro_jax.exact import METHODS, Batch, StepSize, fallback, phases, retract
from loro_jax.exact.reference import svd_step
from loro_jax.exact.step import ExactStep
from loro_jax.exact.update import counted_exact_updates
from tests.helpers import act_as, some_fast

# Error of W beyond the best rank-r approximation, over |W - lr grad|.
TOLERANCE = {"svd": 2e-5, "gram": 4e-5, "graph": 4e-5}
RATE = 0.01

# Tall, wide and square; rank one, below half, above half, and full.
# The first is that of most tests: a step is compiled anew for each shape.
SHAPES = [(96, 64, 16), (64, 96, 40), (48, 48, 48), (50, 40, 1), (40, 60, 40)]


def spectrum(kind, r, condition):
    if kind == "repeated":
        return np.where(np.arange(r) < (r + 1) // 2, 1.0, 1 / condition)
    return np.geomspace(1, 1 / condition, r)


def make_pair(rng, shape, kind, condition, gradient):
    m, n, r = shape

    def factor(rows):
        U, _ = np.linalg.qr(rng.normal(size=(rows, r)))
        V, _ = np.linalg.qr(rng.normal(size=(r, r)))
        return (U * spectrum(kind, r, condition)) @ V.T

    B, A = factor(m).astype(np.float32), factor(n).T.astype(np.float32)
    if kind == "deficient B":
        B[:, : max(1, r // 3)] = 0
    if kind == "deficient A":
        A[: max(1, r // 3)] = 0
    G = gradient * rng.normal(size=(m, n))
    return B, A, (G @ A.T).astype(np.float32), (B.T @ G).astype(np.float32)


def target(B, A, dB, dA):
    """W - lr grad in float64, by the SVDs of the factors; and its singular values."""
    B, A, dB, dA = (np.asarray(x, np.float64) for x in (B, A, dB, dA))

    def side(X):
        U, s, Vt = np.linalg.svd(X, full_matrices=False)
        kept = s > s[0] * 1e-12
        return U[:, kept], s[kept], Vt[kept]

    (U, s_B, Vt_B), (V, s_A, Vt_A) = side(B), side(A.T)
    left, right = (Vt_B @ dA) / s_B[:, None], (dB @ Vt_A.T) / s_A
    T = B @ A - RATE * (U @ left + (right - U @ (U.T @ right)) @ V.T)
    return T, np.linalg.svd(T, compute_uv=False)


def excess(B, A, T, s):
    """Distance of the product B A from T beyond that of the best, given T's singular values."""
    W = np.asarray(B, np.float64) @ np.asarray(A, np.float64)
    return np.linalg.norm(W - T) - np.sqrt(np.sum(s[B.shape[1] :] ** 2))


@functools.cache
def compiled(method, basis="singular"):
    @jax.jit
    def step(*pairs):
        batch = Batch(*pairs, StepSize(RATE))
        ((B, A),), count = counted_exact_updates([batch], method=method, basis=basis, where="test")
        return B, A, count

    return step


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", some_fast(SHAPES, SHAPES[:1]), ids=str)
@pytest.mark.parametrize("kind", ["geometric", "repeated", "deficient B", "deficient A"])
def test_float32_error_beyond_the_best_approximation(method, shape, kind):
    if shape[2] == 1 and kind.startswith("deficient"):
        pytest.skip("a rank-one factor without rank is zero")
    rng = np.random.default_rng(0)
    for condition in (1, 10, 30, 100, 1e3, 1e4, 1e6):
        for gradient in (0, 1e-8, 1e-3, 1, 1e4):
            arguments = make_pair(rng, shape, kind, condition, gradient)
            T, s = target(*arguments)
            B, A, _ = compiled(method)(*arguments)
            # Not-a-numbers fail this comparison too.
            assert excess(B, A, T, s) <= TOLERANCE[method] * np.linalg.norm(T), (
                condition,
                gradient,
            )


@pytest.mark.parametrize("method", some_fast(["graph", "gram"], ["graph"]))
@pytest.mark.parametrize("condition", [3, 10, 100])
def test_ranks_of_several_blocks(method, condition):
    """Above 64 rows, Cholesky factorisations are put together from blocks."""
    arguments = make_pair(np.random.default_rng(0), (320, 260, 150), "geometric", condition, 0.1)
    T, s = target(*arguments)
    B, A, fallbacks = compiled(method)(*arguments)
    assert excess(B, A, T, s) <= TOLERANCE[method] * np.linalg.norm(T)
    assert int(fallbacks) == 0 or condition > 3


@pytest.mark.parametrize("method", ["graph", "gram"])
def test_fast_methods_are_fast_where_they_can_and_say_where_they_can_not(method):
    rng = np.random.default_rng(0)
    for condition, expected in ((3, 0), (1e4, 1)):
        arguments = make_pair(rng, (96, 64, 16), "geometric", condition, 1e-3)
        *_, fallbacks = compiled(method)(*arguments)
        assert int(fallbacks) == expected


@pytest.mark.parametrize(
    ("method", "conditions"),
    # By the graph, ten pairs are two chunks of five, and seven one of four and one of three.
    [
        pytest.param("gram", (3, 1e5, 2), marks=pytest.mark.slow),
        pytest.param("graph", (3, 1e5, *range(2, 10)), marks=pytest.mark.slow),
        ("graph", (3, 1e5, *range(2, 7))),
    ],
)
def test_a_batch_falls_back_pair_by_pair(monkeypatch, method, conditions):
    monkeypatch.setattr(phases, "COEFFICIENTS", 5 * 13 * 16**2)
    rng = np.random.default_rng(0)
    pairs = [make_pair(rng, (96, 64, 16), "geometric", c, 1e-3) for c in conditions]
    batch = [np.stack(side) for side in zip(*pairs, strict=True)]
    # Compiled anew, with that bound.
    B, A, fallbacks = compiled.__wrapped__(method)(*batch)
    assert int(fallbacks) == 1
    for i, arguments in enumerate(pairs):
        T, s = target(*arguments)
        assert excess(B[i], A[i], T, s) <= 4e-5 * np.linalg.norm(T)


@pytest.mark.slow
def test_what_a_step_needs_beside_the_pairs_does_not_grow_with_them(monkeypatch):
    monkeypatch.setattr(phases, "COEFFICIENTS", 8 * 13 * 16**2)

    def needed(pairs):
        B = jax.ShapeDtypeStruct((pairs, 96, 16), jnp.float32)
        A = jax.ShapeDtypeStruct((pairs, 16, 64), jnp.float32)
        step = jax.jit(lambda *arguments: exact_update(*arguments, RATE), donate_argnums=(0, 1))
        return step.lower(B, A, B, A).compile().memory_analysis().temp_size_in_bytes

    # One byte a pair says whether it fell back.
    assert needed(64) - needed(16) < 1000


@pytest.mark.slow
def test_batches_of_a_gpu_fall_back_pair_by_pair(monkeypatch):
    """Run eagerly: batched LAPACK calls may block each other."""
    act_as("cuda", monkeypatch)
    rng = np.random.default_rng(0)
    pairs = [make_pair(rng, (40, 24, 8), "geometric", condition, 1e-3) for condition in (3, 1e5)]
    batch = [jnp.array(np.stack(side)) for side in zip(*pairs, strict=True)]
    with jax.disable_jit():
        size = StepSize(jnp.full(2, RATE, jnp.float32))
        ((B, A, ok),) = retract("graph", [Batch(*batch, size)])
    assert ok.tolist() == [True, False]
    for i, arguments in enumerate(pairs):
        T, s = target(*arguments)
        assert excess(B[i], A[i], T, s) <= 4e-5 * np.linalg.norm(T)


@pytest.mark.parametrize("basis", ["singular", "nearest"])
@pytest.mark.parametrize("kind", ["geometric", "deficient B", "deficient A"])
def test_the_reference_of_a_tpu_needs_no_svd(kind, basis, monkeypatch):
    """There it works by polar factors and eigendecompositions, in float32."""
    act_as("tpu", monkeypatch)
    for name in ("svd", "qr"):
        monkeypatch.setattr(jnp.linalg, name, None)
    size = StepSize(jnp.float32(RATE))
    step = jax.jit(lambda *arguments: svd_step(*arguments, size, basis))
    rng = np.random.default_rng(0)
    for condition in (1, 30, 1e3):
        for gradient in (0, 1e-3, 1e4):
            arguments = make_pair(rng, (96, 64, 16), kind, condition, gradient)
            T, s = target(*arguments)
            B, A, _ = step(*arguments)
            assert excess(B, A, T, s) <= TOLERANCE["svd"] * np.linalg.norm(T), (condition, gradient)
            np.testing.assert_allclose(B.T @ B, A @ A.T, atol=1e-4 * np.linalg.norm(T))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["graph", "svd"])
def test_pairs_of_all_shapes_step_together(method, monkeypatch):
    """Their r x r parts share a program, in chunks across shapes; so does the reference."""
    monkeypatch.setattr(phases, "COEFFICIENTS", 2 * 13 * 8**2)
    rng = np.random.default_rng(0)
    shapes = [(40, 24, 8), (24, 56, 8), (40, 40, 8), (24, 24, 5)]
    conditions = [(3, 1e5), (2, 3, 1e3), (1e5,), (4, 5)]
    batches, targets = [], []
    for shape, of_shape in zip(shapes, conditions, strict=True):
        pairs = [make_pair(rng, shape, "geometric", c, 1e-3) for c in of_shape]
        targets.append([target(*pair) for pair in pairs])
        stacked = [np.stack(side) for side in zip(*pairs, strict=True)]
        batches.append(Batch(*stacked, StepSize(np.full(len(of_shape), RATE, np.float32))))
    found = jax.jit(lambda batches: retract(method, batches))(batches)
    for steps, of_batch in zip(found, targets, strict=True):
        for B, A, (T, s) in zip(steps.B, steps.A, of_batch, strict=True):
            assert excess(B, A, T, s) <= TOLERANCE[method] * np.linalg.norm(T)
    assert [steps.ok.tolist() for steps in found] == [
        [method == "svd" or condition < 100 for condition in of_shape] for of_shape in conditions
    ]


def test_pairs_that_are_not_finite_are_nan_without_a_fallback(monkeypatch):
    """Factorisations of NaN take hundreds of times as long as the step."""

    # In place of the reference, what nobody can take for a result of its own.
    def sevens(B, A, *rest, **basis):
        return ExactStep(7 + 0 * B, 7 + 0 * A, jnp.bool_(True))

    monkeypatch.setattr(fallback, "_STEP_OF_ONE", {"gram": sevens, "svd": sevens})
    rng = np.random.default_rng(0)
    pairs = [make_pair(rng, (40, 24, 8), "geometric", c, 1e-3) for c in (3, 2, 4, 1e5)]
    for i, of_pair in ((1, 2), (2, 0)):  # a direction, a factor
        pairs[i][of_pair][0, 0] = np.nan
    batch = [np.stack(side) for side in zip(*pairs, strict=True)]
    size = StepSize(np.full(4, RATE, np.float32))
    ((B, A, ok),) = jax.jit(lambda batches: retract("graph", batches))([Batch(*batch, size)])
    assert ok.tolist() == [True, False, False, False]
    assert np.isnan(B[1:3]).all()
    assert np.isnan(A[1:3]).all()
    T, s = target(*pairs[0])
    assert excess(B[0], A[0], T, s) <= TOLERANCE["graph"] * np.linalg.norm(T)
    assert (B[3] == 7).all()


def test_fallbacks_are_counted_in_the_state():
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", 1e5, 1e-3)
    C, D, dC, dD = make_pair(rng, (96, 64, 16), "geometric", 2, 1e-3)
    params = {"bad": LowRank(B, A), "good": LowRank(C, D)}
    grads = {"bad": LowRank(dB, dA), "good": LowRank(dC, dD)}
    tx = loro(1e-3, exact_every=2)
    state = tx.init(params)
    counts = []
    for _ in range(4):
        _, state = tx.update(grads, state, params)
        counts.append(int(state.fallbacks))
    assert counts == [0, 1, 1, 2]
    svd = loro(1e-3, exact_every=1, exact_method="svd")
    _, state = svd.update(grads, svd.init(params), params)
    assert int(state.fallbacks) == 0


@pytest.mark.parametrize("method", some_fast(METHODS, ("graph", "svd")))
@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_the_trust_region_bounds_the_move(method, condition):
    """Without it, Adam-sized directions move an ill-conditioned product by more than its norm."""
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", condition, 1.0)
    dB, dA = np.sign(dB), np.sign(dA)
    W = B @ A

    def move(max_move):
        new = exact_update(B, A, dB, dA, RATE, method=method, max_move=max_move)
        return np.linalg.norm(LowRank(*new).product() - W) / np.linalg.norm(W)

    assert move(None) > 1
    assert move(jnp.float32(0.05)) <= 0.1
    assert 0 < move(0.05) <= 0.1
    np.testing.assert_allclose(move(1e9), move(None), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_trust_region_leaves_small_steps_alone(method):
    rng = np.random.default_rng(0)
    arguments = make_pair(rng, (96, 64, 16), "geometric", 10, 1e-3)
    free = exact_update(*arguments, RATE, method=method)
    bound = exact_update(*arguments, RATE, method=method, max_move=0.5)
    for one, other in zip(free, bound, strict=True):
        np.testing.assert_array_equal(one, other)


def damped_move(B, A, dB, dA, damping):
    """``lr grad`` in float64, with the inverses of ``B^T B + mu I`` and ``A A^T + mu I``."""
    B, A, dB, dA = (np.asarray(x, np.float64) for x in (B, A, dB, dA))
    r = B.shape[1]

    def inverse(gram):
        return np.linalg.inv(gram + damping * np.trace(gram) / r * np.eye(r))

    Q_B, Q_A = np.linalg.qr(B)[0], np.linalg.qr(A.T)[0]
    left, right = B @ inverse(B.T @ B) @ dA, dB @ inverse(A @ A.T) @ A
    return RATE * (left + right - Q_B @ (Q_B.T @ right) @ (Q_A @ Q_A.T))


@pytest.mark.parametrize("method", some_fast(METHODS, ("graph", "svd")))
@pytest.mark.parametrize("condition", [3, 1e2, 1e3])
def test_damping_is_of_the_inverses(method, condition):
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", condition, 1.0)
    dB, dA = np.sign(dB), np.sign(dA)
    T = np.asarray(B, np.float64) @ A - damped_move(B, A, dB, dA, 0.1)
    s = np.linalg.svd(T, compute_uv=False)
    new = exact_update(B, A, dB, dA, RATE, method=method, damping=jnp.float32(0.1))
    assert excess(*new, T, s) <= 4e-5 * np.linalg.norm(T)


@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_damping_bounds_the_move_where_the_undamped_one_exceeds_the_product(condition):
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (96, 64, 16), "geometric", condition, 1.0)
    dB, dA = np.sign(dB), np.sign(dA)

    def move(damping):
        new = exact_update(B, A, dB, dA, RATE, damping=damping)
        return np.linalg.norm(LowRank(*new).product() - B @ A)

    assert move(None) > np.linalg.norm(B @ A)
    # x / (x^2 + mu) is at most 1 / (2 sqrt(mu)), and the retraction at most doubles the step.
    for damping in (0.01, 0.1, 1.0):
        roots = [np.sqrt(damping / 16) * np.linalg.norm(X) for X in (B, A)]
        bound = RATE * (np.linalg.norm(dA) / (2 * roots[0]) + np.linalg.norm(dB) / (2 * roots[1]))
        assert move(damping) <= 2 * bound
    assert move(1.0) < 0.2 * move(None)


@pytest.mark.slow
def test_damping_and_trust_region_follow_schedules_and_injected_values():
    rng = np.random.default_rng(0)
    B, A, dB, dA = make_pair(rng, (40, 24, 8), "geometric", 1e2, 1.0)
    params, grads = LowRank(B, A), LowRank(np.sign(dB), np.sign(dA))
    fixed = {"learning_rate": RATE, "exact_every": 1, "direction": optax.identity()}

    def second_update(tx):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
        return updates

    for name in ("damping", "max_move"):
        expected = second_update(loro(**fixed, **{name: 0.2}))
        stepped = loro(**fixed, **{name: lambda step: 0.1 * (step + 1)})
        factory = functools.partial(loro, direction=optax.identity())
        injected = optax.inject_hyperparams(factory)(
            learning_rate=RATE, exact_every=1, **{name: 0.2}
        )
        for tx in (stepped, injected):
            found = second_update(tx)
            np.testing.assert_allclose(found.product(), expected.product(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["damping", "max_move"])
def test_negative_bounds_are_named(name):
    with pytest.raises(ValueError, match=f"{name} must not be negative, but is -0.1"):
        loro(0.1, **{name: -0.1})


def test_unknown_methods_are_named():
    with pytest.raises(ValueError, match=r"must be one of .* but is 'qr'"):
        exact_update(*(jnp.eye(3),) * 4, 0.1, method="qr")
    with pytest.raises(ValueError, match="'qr'"):
        loro(0.1, exact_method="qr")


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_pairs_stays_empty(method):
    B, A = exact_update(*(jnp.ones((0, 4, 2)), jnp.ones((0, 2, 3))) * 2, 0.1, method=method)
    assert (B.shape, A.shape) == ((0, 4, 2), (0, 2, 3))

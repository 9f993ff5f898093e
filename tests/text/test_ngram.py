import itertools
import math

import numpy as np

from loro_jax.text.ngram import DISCOUNT, ngram_perplexity


def slow_bigram(train, inputs, targets, V):
    """Interpolated Kneser-Ney, written out."""
    train = list(train)
    pairs = list(itertools.pairwise(train))
    continuation = [len({a for a, b in pairs if b == w}) + 0.5 for w in range(V)]
    total = sum(continuation)
    logs = []
    for a, b in zip(inputs, targets, strict=True):
        followers = [y for x, y in pairs if x == a]
        lower = continuation[b] / total
        if followers:
            discounted = max(followers.count(b) - DISCOUNT, 0) / len(followers)
            p = discounted + DISCOUNT * len(set(followers)) / len(followers) * lower
        else:
            p = lower
        logs.append(math.log(p))
    return math.exp(-np.mean(logs))


def test_against_the_definition():
    rng = np.random.default_rng(0)
    V = 12
    train = rng.choice(V - 2, p=rng.dirichlet(np.ones(V - 2)), size=200)  # two ids never occur
    inputs, targets = rng.integers(V, size=50), rng.integers(V, size=50)
    found = ngram_perplexity(train, inputs, targets, V)
    np.testing.assert_allclose(found.bigram, slow_bigram(train, inputs, targets, V), rtol=1e-12)
    counts = np.bincount(train, minlength=V) + 1
    expected = math.exp(-np.mean(np.log(counts[targets] / counts.sum())))
    np.testing.assert_allclose(found.unigram, expected, rtol=1e-12)


def test_the_bigram_model_is_a_distribution():
    rng = np.random.default_rng(1)
    V = 9
    train = rng.integers(V - 1, size=60)
    for context in range(V):
        probabilities = [
            1 / ngram_perplexity(train, np.array([context]), np.array([target]), V).bigram
            for target in range(V)
        ]
        np.testing.assert_allclose(sum(probabilities), 1.0, rtol=1e-9)

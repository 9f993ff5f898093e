"""What tests of several folders share."""

import contextlib
import functools
import io
import json
import os
import subprocess
import sys

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from loro_jax.__main__ import main
from tests.conftest import ROOT


def assert_trees_match(found, wanted, **tolerance):
    """Trees of one structure, of the same dtypes, and close: chex compares values alone."""
    chex.assert_trees_all_equal_dtypes(found, wanted)
    chex.assert_trees_all_close(found, wanted, **tolerance)


def some_fast(values, fast):
    """Parameters of a test: those in ``fast`` in both tiers, all others in the slow one alone."""
    return [x if x in fast else pytest.param(x, marks=pytest.mark.slow) for x in values]


@functools.partial(jax.jit, static_argnums=0)
def _outputs(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


def outputs(network, x):
    """What an NNX network computes, as a program that networks of one structure share."""
    return np.asarray(_outputs(*nnx.split(network), x))


def take_steps(tx, params, grads):
    """Parameters and state after a compiled step along each gradient.

    In place of a gradient may stand a loss, a function of the parameters.
    """
    state, update = tx.init(params), jax.jit(tx.update)
    gradients = {loss: jax.jit(jax.grad(loss)) for loss in grads} if callable(grads[0]) else {}
    for grad in grads:
        grad = gradients[grad](params) if callable(grad) else grad
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def member(i, stacked):
    """The i-th of the trees that are stacked along the leading axes of one."""
    return jax.tree.map(lambda x: x[i], stacked)


def call(program, arguments):
    """Calls a program in this process: its exit status and all that it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = program(arguments)
    return status, output.getvalue()


def command(*arguments):
    """Runs ``python -m loro_jax`` in this process, as :func:`call` does."""
    return call(main, [str(argument) for argument in arguments])


def run_module(name, *arguments, **environment):
    """The JSON objects that a module of the checkout prints, one a line, in its own process.

    Its warnings are errors, and it must end well. It inherits the options of XLA.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", name, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def act_as(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes programs of the library take the branches of another platform."""
    original = jax.lax.platform_dependent

    def chosen(*arguments, default=None, **by_platform):
        branch = by_platform.get(platform, default)
        # JAX's own functions know branches of this platform only.
        if branch is None:
            return original(*arguments, default=default, **by_platform)
        return branch(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", chosen)

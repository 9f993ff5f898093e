"""The parts of ``train.py``: configuration, data, the step, the loop, checkpoints, metrics.

This subpackage needs the ``train`` extra. It trains the networks in ``models/``, which live in a
checkout of the repository and are not part of the installed package.
"""

import importlib.util

if importlib.util.find_spec("models") is None:
    raise ImportError(
        "loro_jax.training trains the networks in models/, which are part of the repository and "
        "not of the installed package: run it from a checkout (python train.py)."
    )

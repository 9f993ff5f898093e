"""Forwards ``python -m models.huggingface`` to :mod:`loro_jax.commands.weights`."""

import sys

from loro_jax.commands.weights import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

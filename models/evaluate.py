"""Forwards ``python -m models.evaluate`` to :mod:`loro_jax.commands.evaluate`."""

import sys

from loro_jax.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

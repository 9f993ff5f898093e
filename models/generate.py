"""Forwards ``python -m models.generate`` to :mod:`loro_jax.commands.generate`."""

import sys

from loro_jax.commands.generate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

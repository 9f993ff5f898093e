"""Forwards to :mod:`loro_jax.commands.prepare`."""

import sys

from loro_jax.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

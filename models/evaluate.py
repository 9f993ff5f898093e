"""The former place of ``python -m loro_jax evaluate``."""

import sys

from loro_jax.__main__ import moved

if __name__ == "__main__":
    sys.exit(moved("evaluate", sys.argv[1:]))

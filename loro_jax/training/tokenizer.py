"""The former place of ``python -m loro_jax tokenizer``."""

import sys

from loro_jax.__main__ import moved

if __name__ == "__main__":
    sys.exit(moved("tokenizer", sys.argv[1:]))

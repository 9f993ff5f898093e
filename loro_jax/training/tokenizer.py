"""Forwards ``python -m loro_jax.training.tokenizer`` to :mod:`loro_jax.text.tokenizers`."""

import sys

from loro_jax.text.tokenizers.training import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

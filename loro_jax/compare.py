"""``python -m loro_jax.compare``, another name for ``python -m loro_jax compare``."""

import sys

from loro_jax.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))

"""The command ``python -m loro_jax.compare``; see :mod:`loro_jax.study.comparison`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from loro_jax.study.comparison import main

    sys.exit(main(sys.argv[1:]))

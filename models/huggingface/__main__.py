"""The former place of ``python -m loro_jax export`` and ``python -m loro_jax import``."""

import sys

from loro_jax.__main__ import moved

if __name__ == "__main__":
    if sys.argv[1:2] not in (["export"], ["import"]):
        print("moved: python -m loro_jax export, python -m loro_jax import", file=sys.stderr)
        sys.exit(2)
    sys.exit(moved(sys.argv[1], sys.argv[2:]))

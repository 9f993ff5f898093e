"""``prepare`` and ``verify`` of ``python -m loro_jax``, by another name."""

import sys

from loro_jax.__main__ import main

if __name__ == "__main__":
    if sys.argv[1:2] not in (["prepare"], ["verify"]):
        print("usage: python -m loro_jax.training.data {prepare,verify} ...", file=sys.stderr)
        sys.exit(2)
    sys.exit(main(sys.argv[1:]))

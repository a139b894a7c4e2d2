"""Cut 14 MB of numbers from the authors' released code down to tests/data/oracle.npz, under 4 MiB.

    python tests/data/make_oracle_cut.py .../oracle/released.npz

The cut keeps names, types and values, so that one test reads either file. It drops update/params/*,
which equal params/*, and keeps every 16th row of the large matrices among gradients and updated
weights. A row of a gradient still depends on the whole pass, and the norm of the whole gradient
stays. Inputs, parameters and every other output stay whole.
"""

import os
import sys
from pathlib import Path

import numpy as np

EVERY = 16
LIMIT = 4 * 2**20


def cut(full) -> dict[str, np.ndarray]:
    """All arrays of the full file -> those of the cut.

    Raises ValueError if update/params/* differ from params/*.
    """
    small = {}
    for name in full.files:
        array = full[name]
        large = array.ndim == 2 and len(array) == 256
        if name.startswith("update/params/"):
            same = name.removeprefix("update/")
            if not np.array_equal(array, full[same]):
                raise ValueError(f"{name} differs from {same}: it cannot be dropped")
        elif large and name.startswith(("update/after1/", "out/bc_grad/")):
            small[name] = array[::EVERY]
        else:
            small[name] = array
    return small


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = Path(__file__).with_name("oracle.npz")
    partial = path.with_name("oracle.partial.npz")
    try:
        with np.load(sys.argv[1]) as full:
            np.savez_compressed(partial, **cut(full))
        if partial.stat().st_size > LIMIT:
            sys.exit(f"the cut has {partial.stat().st_size} bytes, more than {LIMIT}: raise EVERY")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

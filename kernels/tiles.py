"""How a batch is cut up for a kernel: rows per program, chunk size, warps, pipeline stages.

The tiles were chosen by compiling (bench/offline.py), not yet by timing. A tile is good if nothing
spills and the matrix units have work. The small one is transposed, so that 16 rows still fill the
units, and it keeps every SM busy at small batches; the large one reads each weight for more rows.
bench.sampling times both around SMALL_BATCH. With two stages a chunk's weights are loaded only once
the chunk before it is finished; with three they are loaded meanwhile.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """How a batch is cut up. Kernels take it whole, as one compile-time constant."""

    transposed: bool  # activations are (features, rows), features on the matrix unit's M axis
    rows: int  # per program
    chunk: int  # hidden units at a time
    warps: int
    stages: int  # of software pipelining


def _small(chunk: int, warps: int, stages: int = 3) -> Tile:
    return Tile(transposed=True, rows=16, chunk=chunk, warps=warps, stages=stages)


def _large(rows: int, chunk: int = 32, warps: int = 8, stages: int = 3) -> Tile:
    return Tile(transposed=False, rows=rows, chunk=chunk, warps=warps, stages=stages)


SMALL = {
    "fp16": _small(64, 4),
    "tf32": _small(32, 4),
    "fp16x3": _small(32, 8),
    "fp32": _small(16, 4),
}
LARGE = {
    "fp16": _large(128),
    "tf32": _large(64, stages=1),
    "fp16x3": _large(64, chunk=16),
    "fp32": _large(64),
}
# Exceptions to sm_90's tiles: fp16 with more stages spills on sm_100; fp32 with more would not
# leave sm_80 room for wide states; fp16x3 spills on sm_80, and on sm_100 Triton 3.6 to 3.8 compile
# it to a trap unless the tile is too small for that chip's own matrix unit.
LARGE_ON = {
    (80, "fp32"): _large(64, stages=2),
    (100, "fp16"): _large(64, stages=1),
    (100, "fp16x3"): _large(32, chunk=16, warps=4),
    (80, "fp16x3"): _large(32, chunk=16, warps=4),
}
# With 512 hidden units a row's activations take twice the registers. Only fp16 leaves room for
# large tiles.
SMALL_512 = {
    "fp16": _small(32, 8),
    "tf32": _small(32, 8, stages=2),
    "fp16x3": _small(16, 8),
    "fp32": _small(16, 8),
}
LARGE_512 = {"fp16": _large(64)}
# training.fit goes forward and backward through two kinds of network: with three stages it would
# need more shared memory than an H100 has.
FIT_STAGES = 2
SMALL_BATCH = 4096  # rows up to which tiles are small; beyond, 132 SMs have work with large ones
ARCHITECTURES = (80, 90, 100)
# GeForce and workstation cards: 99 KB of shared memory per block, where those above have 163 or
# 227.
LITTLE_MEMORY = (86, 89, 120)


def choose_tile(n_rows: int, precision: str, arch: int = 90, hidden_dim: int = 256) -> Tile:
    """The sampler's tile for a batch on sm_{arch}."""
    small = SMALL_512[precision] if hidden_dim > 256 else SMALL[precision]
    if arch in LITTLE_MEMORY:
        return small._replace(stages=2)
    if n_rows <= SMALL_BATCH:
        return small
    if hidden_dim > 256:
        return LARGE_512.get(precision, small)
    family = max(known for known in ARCHITECTURES if known <= arch)
    return LARGE_ON.get((family, precision), LARGE[precision])


def choose_actor_tile(
    n_states: int, n_candidates: int, precision: str, arch: int = 90, hidden_dim: int = 256
) -> Tile:
    """The actor's tile for n_candidates of each of n_states.

    A program's rows belong to one state, so it has 64 at most.
    """
    tile = choose_tile(n_states * n_candidates, precision, arch, hidden_dim)
    return tile._replace(rows=64, warps=4) if tile.rows > 64 else tile


class ProductTile(NamedTuple):
    """How a weight gradient is cut up. Kernels take it whole, as one compile-time constant."""

    outputs: int  # per program
    inputs: int  # per program
    rows: int  # per step of the sum over rows
    warps: int
    stages: int  # of software pipelining


def choose_update_tile(precision: str, arch: int = 90, hidden_dim: int = 256) -> Tile:
    """The tile of all launches of an update that go by rows.

    It does not depend on how many agents learn together: each has to get the numbers it would get
    alone. 256 rows are 16 tiles, so that one agent's chain is short and eight agents fill an H100.
    """
    tile = choose_tile(1, precision, arch, hidden_dim)
    if precision == "tf32" and hidden_dim > 256 and arch < 90:
        tile = tile._replace(chunk=16)  # or training.fit would take 166 KB of an A100's 163
    return tile


def choose_product_tile(precision: str) -> ProductTile:
    """The tile of an update's weight gradients."""
    rows = 32 if precision in ("fp32", "fp16x3") else 64
    return ProductTile(outputs=32, inputs=64, rows=rows, warps=4, stages=3)

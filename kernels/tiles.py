"""How a batch is cut up for a kernel: rows per program, chunk size, warps, pipeline stages.

sm_90's tiles for up to 256 hidden units were timed in the sampler on an H100 (bench/tiles.py), the
others chosen by compiling (bench/offline.py); of updates only fp16's was timed. The small ones are
transposed, so that 16 or 32 rows still fill the matrix units, and keep every SM busy at small
batches; the large ones read each weight for more rows. bench.sampling times all at sizes around
those where the choice changes. With two stages a chunk's weights are loaded only once the chunk
before it is finished; with three they are loaded meanwhile.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """How a batch is cut up. Kernels take it whole, as one compile-time constant."""

    transposed: bool  # activations are (features, rows), features on the matrix unit's M axis
    rows: int  # per program
    chunk: int  # hidden units at a time
    warps: int
    stages: int  # of software pipelining


def _small(chunk: int, warps: int, stages: int = 3, rows: int = 16) -> Tile:
    return Tile(transposed=True, rows=rows, chunk=chunk, warps=warps, stages=stages)


def _large(rows: int, chunk: int = 32, warps: int = 8, stages: int = 3) -> Tile:
    return Tile(transposed=False, rows=rows, chunk=chunk, warps=warps, stages=stages)


ANY = 1 << 62  # rows
# Each tile with the most rows of a batch that it is for: 132 SMs have a program each up to 2,112
# rows if it takes 16, up to 4,224 if it takes 32. fp32 uses no matrix unit, and a tile of 64 rows
# is slower at any size. Those of tf32 that are not transposed are 1 % faster at best, and some make
# wgmma read beyond shared memory (Triton 3.6).
HOPPER = {
    "fp16": ((2048, _small(64, 4)), (4096, _small(64, 4, rows=32)), (ANY, _large(64, warps=4))),
    "tf32": ((2048, _small(32, 4)), (ANY, _small(32, 4, stages=2, rows=32))),
    "fp16x3": (
        (2048, _small(64, 4, stages=2)),
        (8192, _small(32, 4, stages=2, rows=32)),
        (ANY, _large(64, warps=4, stages=2)),
    ),
    "fp32": ((ANY, _small(16, 4)),),
}
# For updates, and on other GPUs for up to 4,096 rows; beyond, the large ones. On sm_100 fp16 with
# more stages spills, and Triton 3.6 to 3.8 compile fp16x3 to a trap unless the tile is too small
# for that chip's own matrix unit; it spills on sm_80.
SMALL = {
    "fp16": _small(64, 4),
    "tf32": _small(32, 4),
    "fp16x3": _small(32, 8),
    "fp32": _small(16, 4),
}
LARGE = {
    (80, "fp16"): _large(128),
    (80, "tf32"): _small(32, 4, stages=2, rows=32),
    (80, "fp16x3"): _large(32, chunk=16, warps=4),
    (80, "fp32"): _small(16, 4),
    (100, "fp16"): _large(64, stages=1),
    (100, "tf32"): _small(32, 4, stages=2, rows=32),
    (100, "fp16x3"): _large(32, chunk=16, warps=4),
    (100, "fp32"): _small(16, 4),
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
# training.fit runs beside sample, which takes longer with one agent. Without pipelining more of its
# programs fit on an SM: alone it takes 80 µs for eight agents, with two stages 96 (H100).
FIT_STAGES = 1
SMALL_BATCH = 4096  # rows up to which tiles are small where none were timed
ARCHITECTURES = (80, 90, 100)
# GeForce and workstation cards: 99 KB of shared memory per block, where those above have 163 or
# 227.
LITTLE_MEMORY = (86, 89, 120)


def _small_tile(precision: str, arch: int, hidden_dim: int) -> Tile:
    small = SMALL_512[precision] if hidden_dim > 256 else SMALL[precision]
    return small._replace(stages=2) if arch in LITTLE_MEMORY else small


def choose_tile(n_rows: int, precision: str, arch: int = 90, hidden_dim: int = 256) -> Tile:
    """The sampler's tile for a batch on sm_{arch}."""
    family = max(known for known in ARCHITECTURES if known <= arch)
    if family == 90 and hidden_dim <= 256:
        return next(tile for most, tile in HOPPER[precision] if n_rows <= most)
    small = _small_tile(precision, arch, hidden_dim)
    if n_rows <= SMALL_BATCH or arch in LITTLE_MEMORY:
        return small
    return LARGE_512.get(precision, small) if hidden_dim > 256 else LARGE[family, precision]


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
    tile = _small_tile(precision, arch, hidden_dim)
    if precision == "tf32" and hidden_dim > 256 and arch < 90:
        tile = tile._replace(chunk=16)  # or training.fit would take 166 KB of an A100's 163
    return tile


def choose_product_tile(precision: str) -> ProductTile:
    """The tile of an update's weight gradients."""
    rows = 32 if precision in ("fp32", "fp16x3") else 64
    return ProductTile(outputs=32, inputs=64, rows=rows, warps=4, stages=3)

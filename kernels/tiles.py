"""How a batch is cut up for a kernel: rows a program, chunks, warps. Chosen by compiling (bench/offline.py), not yet by timing.

A tile is good if nothing spills and the matrix units have work. The small one puts features on M, so that 16 rows still fill them,
and leaves no SM idle at small batches; the large one reads each weight for more rows. bench.sampling times both around SMALL_BATCH.
With two stages a chunk's weights are loaded only when the last chunk is done with; it takes three to load them meanwhile.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """How a batch is cut up. rows a program, hidden units a chunk, warps, software pipelining depth."""

    turned: bool  # features on M
    rows: int
    chunk: int
    warps: int
    stages: int


def _small(chunk: int, warps: int, stages: int = 3) -> Tile:
    return Tile(turned=True, rows=16, chunk=chunk, warps=warps, stages=stages)


def _large(rows: int, chunk: int = 32, warps: int = 8, stages: int = 3) -> Tile:
    return Tile(turned=False, rows=rows, chunk=chunk, warps=warps, stages=stages)


SMALL = {"fp16": _small(64, 4), "tf32": _small(32, 4), "fp16x3": _small(32, 8), "fp32": _small(16, 4)}
LARGE = {"fp16": _large(128), "tf32": _large(64, stages=1), "fp16x3": _large(64, chunk=16), "fp32": _large(64)}
# Elsewhere than on sm_90: more stages of fp16 spill on sm_100; fp32's would not leave sm_80 room for wide states; fp16x3 spills on
# sm_80, and on sm_100 Triton 3.6 to 3.8 compile it to a trap unless the tile is too small for that chip's own matrix unit.
LARGE_ON = {
    (80, "fp32"): _large(64, stages=2),
    (100, "fp16"): _large(64, stages=1),
    (100, "fp16x3"): _large(32, chunk=16, warps=4),
    (80, "fp16x3"): _large(32, chunk=16, warps=4),
}
# With 512 hidden units a row's activations take twice the registers. Only fp16 leaves room for large tiles.
SMALL_512 = {"fp16": _small(32, 8), "tf32": _small(32, 8, stages=2), "fp16x3": _small(16, 8), "fp32": _small(16, 8)}
LARGE_512 = {"fp16": _large(64)}
FIT_STAGES = 2  # with three, training.fit, both ways through two kinds of network, would need more than an H100's shared memory
SMALL_BATCH = 4096  # rows up to which tiles are small; beyond, 132 SMs have work with large ones
ARCHITECTURES = (80, 90, 100)
LITTLE_MEMORY = (86, 89, 120)  # GeForce and workstation cards: 99 KB of shared memory a block, where those above have 163 or 227


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


def choose_actor_tile(n_states: int, n_candidates: int, precision: str, arch: int = 90, hidden_dim: int = 256) -> Tile:
    """The actor's tile for n_candidates of each of n_states. A program's rows belong to one state, so it has 64 at most."""
    tile = choose_tile(n_states * n_candidates, precision, arch, hidden_dim)
    return tile._replace(rows=64, warps=4) if tile.rows > 64 else tile


class ProductTile(NamedTuple):
    """How a weight gradient is cut up: outputs and inputs a program, rows a step of its sum, warps, pipelining depth."""

    outputs: int
    inputs: int
    rows: int
    warps: int
    stages: int


def choose_update_tile(precision: str, arch: int = 90, hidden_dim: int = 256) -> Tile:
    """The tile of all launches of an update that go by rows. It does not depend on how many agents learn together: each has to
    get the numbers it would get alone. 256 rows are 16 tiles, so that one agent's chain is short and eight fill an H100."""
    tile = choose_tile(1, precision, arch, hidden_dim)
    if precision == "tf32" and hidden_dim > 256 and arch < 90:
        tile = tile._replace(chunk=16)  # or training.fit would take 166 KB of an A100's 163
    return tile


def choose_product_tile(precision: str) -> ProductTile:
    """The tile of an update's weight gradients."""
    return ProductTile(outputs=32, inputs=64, rows=32 if precision in ("fp32", "fp16x3") else 64, warps=4, stages=3)

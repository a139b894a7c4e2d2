"""bench/offline.py: kernels compiled for GPUs that are not here fit them and use their units.

They are compiled in a process of its own, since in this one they are defined for the interpreter.
Sizes are antmaze's, with 50 candidates.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="triton has no package for this platform")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block can have
PRECISIONS = ("fp16", "tf32", "fp16x3", "fp32")
CASES = [
    *(f"actor {size} 256 {precision}" for size in ("small", "large") for precision in PRECISIONS),
    *(f"sampler {size} 256 fp16" for size in ("small", "middle", "large")),
    *(f"actor {size} {hidden} fp16" for size in ("small", "large") for hidden in (128, 512)),
    # The critics' Adam is the policy's with other constants.
    *(f"update {kernel} 256 fp16" for kernel in ("sample", "fit", "climb")),
    *(f"update weight_gradients {kind} 256 fp16" for kind in ("policy", "critic")),
    "update time_gradient 256 fp16",
    *(f"update {kernel} 256 fp16" for kernel in ("adam policy", "finish")),
    *(f"update climb 256 {precision}" for precision in ("tf32", "fp16x3", "fp32")),
]
NO_PRODUCTS = ("time_gradient", "adam", "finish")  # or small ones in float32
# The most words that may be spilled, loads and stores together; 0 for those not listed. It is what
# Triton 3.6.0 or 3.8.0 spilled, whichever spilled more.
SPILLED = {
    (80, "actor small 256 fp16"): 22,
    (80, "actor small 256 tf32"): 20,
    (80, "actor small 256 fp16x3"): 32,
    (80, "actor small 256 fp32"): 32,
    (80, "actor large 256 fp16"): 76,
    (80, "actor large 256 tf32"): 68,
    (80, "actor large 256 fp16x3"): 86,
    (80, "actor large 256 fp32"): 32,
    (80, "actor large 512 fp16"): 116,
    (80, "update sample 256 fp16"): 18,
    (80, "update climb 256 fp16x3"): 100,
    (80, "update climb 256 fp32"): 10,
    (90, "actor small 256 fp16x3"): 67,
    (90, "actor large 256 fp16"): 28,
    (90, "actor large 256 tf32"): 6,
    (90, "actor large 256 fp16x3"): 870,
    (90, "sampler large 256 fp16"): 6,
    (90, "actor large 512 fp16"): 68,
    (90, "update sample 256 fp16"): 15,
    (90, "update climb 256 fp16"): 4,
    (90, "update climb 256 fp16x3"): 52,
    (100, "actor small 256 fp16"): 85,
    (100, "actor small 256 fp16x3"): 68,
    (100, "actor large 256 fp16x3"): 53,
    (100, "sampler small 256 fp16"): 24,
    (100, "sampler middle 256 fp16"): 24,
    (100, "actor small 128 fp16"): 14,
    (100, "actor large 128 fp16"): 8,
    (100, "actor large 512 fp16"): 477,
    (100, "update sample 256 fp16"): 101,
    (100, "update climb 256 fp16"): 32,
    (100, "update climb 256 fp16x3"): 32,
}


def uninterpreted(*arguments) -> list:
    """The lines of JSON that Python prints where kernels are not defined for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_case(findings: list) -> dict:
    """(sm, case) -> what was found."""
    return {(found["arch"], found["case"]): found for found in findings}


def compile_cases(*options) -> dict:
    return by_case(uninterpreted("-m", "bench.offline", *options))


@pytest.fixture(scope="module")
def compiled():
    return compile_cases("--only", *(f"^{case}$" for case in CASES))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", SHARED)
def test_a_kernel_fits_the_chip_and_uses_its_matrix_units(compiled, arch, case):
    """And spills no more than is known."""
    found = compiled[arch, case]
    assert found["instructions"] > 700, "compiled to a trap"
    # On sm_100 the allocation of tensor memory brings a check that may trap.
    assert found["BPT"] == 0 or found["UTCHMMA"] > 0
    assert found["shared"] <= SHARED[arch] and found["undefined"] == 0
    assert found["LDL"] + found["STL"] <= SPILLED.get((arch, case), 0)
    products = found["HGMMA"] + found["UTCHMMA"] + found["HMMA"]
    if any(name in case for name in NO_PRODUCTS):
        assert products == 0
    elif case.endswith("fp32"):
        assert found["FFMA"] > 1000 and products == 0
    elif arch == 90 and "weight_gradients" not in case:
        assert found["HGMMA"] > 0
    else:  # weight_gradients' tiles of 32 outputs are too low for sm_90's groups of warps
        assert found["UTCHMMA"] + found["HMMA"] > 0


def test_the_default_fits_cards_with_little_shared_memory():
    only = "^(sampler|actor) large 256 fp16$", "^update (sample|fit|climb) 256 fp16$"
    found = compile_cases("--arch", "89", "--only", *only)
    assert len(found) == 5 and max(case["shared"] for case in found.values()) <= 99 * 1024


TODAYS_TILES = """
import json
from bench.offline import ARCHITECTURES, cases, tile_of
for arch in ARCHITECTURES:
    for name, case in cases(arch).items():
        print(json.dumps([arch, name, tile_of(case())]))
"""


def test_the_committed_figures_are_of_every_shipped_kernel():
    """And in them each kernel fits its chip."""
    known = by_case(json.loads((ROOT / "bench/results/offline.json").read_text())["cases"])
    tiles = {(arch, name): tile for arch, name, tile in uninterpreted("-c", TODAYS_TILES)}
    assert known.keys() == tiles.keys()
    for (arch, name), found in known.items():
        which = f"{name} on sm_{arch}"
        same_tile = found["tile"] == tiles[arch, name]
        assert same_tile, f"{which} has another tile: run bench.offline --out bench/results"
        assert found["shared"] <= SHARED[arch], which
        undefined = found["undefined"]
        assert undefined == 0, f"{which} gives its assembly registers that hold nothing"
        assert found["instructions"] > 500, f"{which} is a trap"
        assert found["BPT"] == 0 or found["UTCHMMA"] > 0, f"{which} is a trap"


def test_the_cases_are_those_that_are_shipped(compiled):
    assert compiled.keys() == {(arch, case) for arch in SHARED for case in CASES}

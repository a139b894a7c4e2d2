"""What ptxas makes of the kernels for GPUs that are not here: no spills worth the name, matrix units used, chips not overrun.

Compiled in a process of its own: here kernels are defined for the interpreter. Sizes are antmaze's, 50 candidates.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench.timing import RESULTS

pytest.importorskip("triton", reason="triton has no package for this platform")

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one block can have
PRECISIONS = ("fp16", "tf32", "fp16x3", "fp32")
CASES = [
    *(f"actor {size} 256 {precision}" for size in ("small", "large") for precision in PRECISIONS),
    *(f"sampler {size} 256 fp16" for size in ("small", "large")),
    *(f"actor {size} {hidden} fp16" for size in ("small", "large") for hidden in (128, 512)),
    # The critics' weight gradients and Adam are the policy's kernels with other constants.
    *(
        f"update {kernel} 256 fp16"
        for kernel in ("sample", "fit", "climb", "weight_gradients policy")
    ),
    *(f"update {kernel} 256 fp16" for kernel in ("time_gradient", "adam policy", "finish")),
    *(f"update climb 256 {precision}" for precision in ("tf32", "fp16x3", "fp32")),
]
NO_PRODUCTS = ("time_gradient", "adam", "finish")  # or small ones in float32
# Words spilled at most, loads and stores together, 0 where nothing stands here: what Triton 3.6.0 or 3.8.0 did, whichever spilled more.
SPILLED = {
    (80, "actor small 256 fp16"): 22,
    (80, "actor small 256 tf32"): 20,
    (80, "actor small 256 fp16x3"): 32,
    (80, "actor small 256 fp32"): 32,
    (80, "actor large 256 fp16"): 76,
    (80, "actor large 256 fp16x3"): 86,
    (80, "actor large 256 fp32"): 32,
    (80, "actor large 512 fp16"): 116,
    (80, "update sample 256 fp16"): 78,
    (80, "update climb 256 fp16x3"): 102,
    (80, "update climb 256 fp32"): 14,
    (90, "actor small 256 fp16x3"): 33,
    (90, "actor large 256 fp16"): 28,
    (90, "actor large 256 fp16x3"): 211,
    (90, "actor large 256 fp32"): 2,
    (90, "sampler large 256 fp16"): 4,
    (90, "actor large 512 fp16"): 68,
    (90, "update sample 256 fp16"): 4,
    (90, "update climb 256 fp16x3"): 52,
    (100, "actor small 256 fp16"): 85,
    (100, "actor small 256 fp16x3"): 68,
    (100, "actor large 256 tf32"): 231,
    (100, "actor large 256 fp16x3"): 53,
    (100, "actor large 256 fp32"): 18,
    (100, "sampler small 256 fp16"): 24,
    (100, "actor small 128 fp16"): 14,
    (100, "actor large 128 fp16"): 8,
    (100, "actor large 512 fp16"): 477,
    (100, "update sample 256 fp16"): 90,
    (100, "update climb 256 fp16"): 10,
    (100, "update climb 256 tf32"): 3,
    (100, "update climb 256 fp16x3"): 43,
}


def uninterpreted(*arguments) -> list:
    """The lines of JSON that Python prints where kernels are not defined for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def compile_cases(*options) -> dict:
    """(sm, case) -> what bench.offline found."""
    return {
        (found["arch"], found["case"]): found
        for found in uninterpreted("-m", "bench.offline", *options)
    }


@pytest.fixture(scope="module")
def compiled():
    return compile_cases("--only", *(f"^{case}$" for case in CASES))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("arch", SHARED)
def test_a_kernel_fits_the_chip_spills_no_more_than_known_and_uses_its_matrix_units(
    compiled, arch, case
):
    found = compiled[arch, case]
    assert found["instructions"] > 700, "compiled to a trap"
    if (
        found["UTCHMMA"] == 0
    ):  # what allocates the tensor memory of sm_100 brings a check that traps
        assert found["BPT"] == 0
    assert found["shared"] <= SHARED[arch] and found["undefined"] == 0
    assert found["LDL"] + found["STL"] <= SPILLED.get((arch, case), 0)
    if any(name in case for name in NO_PRODUCTS):
        assert found["HGMMA"] + found["UTCHMMA"] + found["HMMA"] == 0
    elif case.endswith("fp32"):
        assert found["FFMA"] > 1000 and found["HGMMA"] + found["UTCHMMA"] + found["HMMA"] == 0
    elif (
        arch == 90 and "weight_gradients" not in case
    ):  # whose tiles of 32 outputs are too low for a warp group
        assert found["HGMMA"] > 0
    else:
        assert found["UTCHMMA"] + found["HMMA"] > 0


def test_the_default_fits_cards_with_little_shared_memory():
    found = compile_cases(
        "--arch",
        "89",
        "--only",
        "^(sampler|actor) large 256 fp16$",
        "^update (sample|fit|climb) 256 fp16$",
    )
    assert len(found) == 5 and max(case["shared"] for case in found.values()) <= 99 * 1024


TODAYS_TILES = """
import json
from bench.offline import ARCHITECTURES, cases, tile_of
for arch in ARCHITECTURES:
    for name, case in cases(arch).items():
        print(json.dumps([arch, name, tile_of(case())]))
"""


def test_the_committed_figures_are_of_every_kernel_that_is_shipped_and_each_fits_its_chip():
    known = {
        (found["arch"], found["case"]): found
        for found in json.loads((RESULTS / "offline.json").read_text())["cases"]
    }
    tiles = {(arch, name): tile for arch, name, tile in uninterpreted("-c", TODAYS_TILES)}
    assert known.keys() == tiles.keys()
    for (arch, name), found in known.items():
        assert found["tile"] == tiles[arch, name], (
            f"{name} on sm_{arch} has another tile: run bench.offline again"
        )
        assert found["shared"] <= SHARED[arch], f"{name} on sm_{arch}"
        assert found["undefined"] == 0, (
            f"{name} on sm_{arch} gives its assembly registers that hold nothing"
        )
        assert found["instructions"] > 500 and (found["BPT"] == 0 or found["UTCHMMA"] > 0), (
            f"{name} on sm_{arch} is a trap"
        )


def test_the_cases_are_those_that_are_shipped(compiled):
    assert compiled.keys() == {(arch, case) for arch in SHARED for case in CASES}

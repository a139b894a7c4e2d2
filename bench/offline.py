"""What ptxas makes of the shipped kernels, without a GPU: registers, spills, shared memory, tensor-core instructions.

    python -m bench.offline                                  # everything, into bench/results/offline.json: minutes
    python -m bench.offline --arch 90 --only "256 fp16$"     # some, and only printed

Nothing is timed. Spills are local loads and stores counted in the machine code: n_spills needs a device.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.timing import RESULTS
from dql import DiffusionQL
from kernels import training, update
from kernels.actor import _actor
from kernels.packing import HIDDEN_DIMS, PRECISIONS
from kernels.sampler import _sampler
from kernels.tiles import ARCHITECTURES, LITTLE_MEMORY, choose_actor_tile, choose_tile
from trainer.folder import save_json
from trainer.provenance import describe

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "LDGSTS", "UTCHMMA", "HMMA", "FFMA", "MUFU", "LDL", "STL", "BPT")


def tile_of(constants: dict, options: dict) -> dict:
    """How a kernel's work is cut up, of the constants and options that it is compiled with."""
    names = ("TURNED", "ROWS", "CHUNK", "OUT_TILE", "IN_TILE", "BLOCK", "STAGES")
    return {name.lower(): constants[name] for name in names if name in constants} | options


def compile_for(arch: int, kernel, signature: dict, constants: dict, **options) -> dict:
    """Compile one kernel; signature: name -> type of each argument that is not a constant. -> what was found"""
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    # What a launch would find out: torch aligns its tensors, and 0 and a batch of 256 are multiples of 16.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, t) in enumerate(types.items())
        if t[0] == "*" or (t == "i32" and name in ("zero", "B"))
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        path = os.pathsep.join([str(TOOLS), os.environ["PATH"]])
        sass, usage = (
            subprocess.run(
                [TOOLS / "cuobjdump", what, file.name], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
            ).stdout
            for what in ("-sass", "-res-usage")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return {
        "arch": arch,
        "tile": tile_of(constants, options),
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "undefined": len(re.findall(r"asm.*\b(?:undef|poison)\b", compiled.asm["llir"])),  # registers given to inline assembly
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        **{name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED},
    }


# Types of the arguments that are neither weights nor constants.
TYPES = {"seed": "i32", "n_rows": "i32", "per_state": "i32", "zero": "i32", "max_action": "fp32", "counter": "*i32", "done": "*i32"}
WEIGHTS = re.compile(r"(q_)?weights(_low)?")
BATCHES = {"small": 1, "large": 1 << 20}  # rows, or states, that get the one tile and the other


def cases(arch: int, hidden_dims=HIDDEN_DIMS) -> dict:
    """name -> a function that gives (kernel, signature, constants, options), for every tile, width and precision that sm_{arch} gets
    at antmaze's sizes."""
    found = {}
    for size, n in BATCHES.items():
        for H in hidden_dims:
            for precision in PRECISIONS:
                tiles = {
                    "sampler": choose_tile(n, precision, arch, H),
                    "actor": choose_actor_tile(n, 50, precision, arch, H),
                }
                for name, kernel in (("sampler", _sampler), ("actor", _actor)):
                    tile = tiles[name]
                    constants = {
                        "STATE_DIM": 29, "ACTION_DIM": 8, "T": 5, "GIVEN": False, "ROWS": tile.rows, "S": 32, "A": 16, "H": H,
                        "CHUNK": tile.chunk, "SCALE": 2.0**-4 if precision == "fp16x3" else 1.0, "PRECISION": precision,
                        "TURNED": tile.turned, "STAGES": tile.stages,
                        "N": 50, "N_PADDED": 64, "PARTS": triton.cdiv(50, tile.rows), "GREEDY": False, "Q_H": H,
                    }  # fmt: skip
                    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
                    stored = "*fp16" if precision.startswith("fp16") else "*fp32"
                    signature = {
                        name: TYPES.get(name, stored if WEIGHTS.fullmatch(name) else "*fp32") for name in kernel.arg_names
                    }
                    if name == "sampler":
                        constants["per_state"] = 1
                    case = kernel, signature, constants, {"num_warps": tile.warps}
                    found[f"{name} {size} {H} {precision}"] = lambda case=case: case
    for H in hidden_dims:
        for precision in PRECISIONS:
            for i, name in enumerate(LAUNCHES):
                if name.endswith("critic"):
                    continue  # the policy's kernels with other constants
                found[f"update {name} {H} {precision}"] = lambda i=i, of=(arch, precision, H): update_launches(*of)[i]
    return found


class Recorder:
    """Stands in for a kernel, and notes what it is launched with."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


# FusedUpdate's launches, in their order.
LAUNCHES = (
    "sample", "fit", "weight_gradients critic", "adam critic", "climb", "weight_gradients policy", "time_gradient", "adam policy",
    "finish",
)  # fmt: skip


@lru_cache
def update_launches(arch: int, precision: str, hidden_dim: int) -> list:
    """(kernel, signature, constants, options) of each of LAUNCHES for antmaze's sizes on sm_{arch}."""
    launches = []
    with ExitStack() as patches:
        for name in {name.split()[0] for name in LAUNCHES}:
            patches.enter_context(patch.object(training, name, Recorder(getattr(training, name), launches)))
        patches.enter_context(patch.object(update, "architecture", lambda device: arch))
        with patch.object(update, "interpreting", lambda: True):  # so that it takes tensors of a CPU
            fused = update.FusedUpdate(DiffusionQL(29, 8, hidden_dim=hidden_dim), None, 256, precision)
        fused.columns = [torch.zeros(1000, 1)] * 5
        launches.clear()
        fused._launch()
    assert [kernel.fn.__name__ for kernel, *_ in launches] == [name.split()[0] for name in LAUNCHES]
    found = []
    for kernel, args, kwargs in launches:
        options = {"num_warps": kwargs.pop("num_warps", 4)}
        values = dict(zip(kernel.arg_names, args)) | kwargs
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        # A launch makes a constant of 1, unless told not to.
        fixed |= {p.name for p in kernel.params if type(values[p.name]) is int and values[p.name] == 1 and not p.do_not_specialize}
        types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64", int: "i32", float: "fp32"}
        signature = {name: types[v.dtype if torch.is_tensor(v) else type(v)] for name, v in values.items() if name not in fixed}
        found.append((kernel, signature, {name: values[name] for name in fixed}, options))
    return found


def compile_case(arch: int, name: str) -> dict:
    kernel, signature, constants, how = cases(arch)[name]()
    return {"case": name, **compile_for(arch, kernel, signature, constants, **how)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=(*ARCHITECTURES, *LITTLE_MEMORY))
    parser.add_argument("--only", nargs="+", default=[""], help="cases in whose name one of these patterns is found")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    options = parser.parse_args(argv)
    todo = [(arch, name) for arch in options.arch for name in cases(arch) if any(re.search(part, name) for part in options.only)]
    found = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for result in pool.map(compile_case, *zip(*todo)):
            print(json.dumps(result), flush=True)
            found.append(result)
    if len(todo) == sum(len(cases(arch)) for arch in ARCHITECTURES):
        save_json(RESULTS / "offline.json", {**describe(), "triton": triton.__version__, "cases": found})


if __name__ == "__main__":
    sys.exit(main())

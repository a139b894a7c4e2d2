"""What ptxas makes of the kernels, without a GPU: registers, spills, shared memory, instructions.

    python -m bench.offline                              # everything, into runs/bench/offline.json
    python -m bench.offline --arch 90 --only "256 fp16$" # some, only printed

Each kernel's launch is recorded, with the arguments that it gets on a GPU, and compiled for the GPU
as the launch would. Nothing is timed. Spills are local loads and stores counted in the machine
code: Triton's own count needs a device. Everything takes seven minutes on two idle cores.
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
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from bench.folders import add_results_option, make_folder
from dql import DiffusionPolicy, DiffusionQL, TwinCritic
from kernels import actor, gradients, launches, optimizer, sampler, training
from kernels.packing import HIDDEN_DIMS, PRECISIONS
from kernels.tiles import ARCHITECTURES, LITTLE_MEMORY, Tile, choose_actor_tile, choose_tile
from trainer.folder import save_json
from trainer.provenance import describe
from trainer.terminal import steady_output

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COUNTED = ("HGMMA", "LDGSTS", "UTCHMMA", "HMMA", "FFMA", "MUFU", "LDL", "STL", "BPT")
STATE_DIM, ACTION_DIM, CANDIDATES, BATCH = 29, 8, 50, 256  # antmaze's
BATCHES = {"small": 1, "middle": 4096, "large": 1 << 20}  # rows with a tile each
# FusedUpdate's launches, in their order.
LAUNCHES = (
    "sample", "fit", "weight_gradients critic", "adam critic", "climb", "weight_gradients policy",
    "time_gradient", "adam policy", "finish",
)  # fmt: skip


class Launch(NamedTuple):
    """A kernel and what it was launched with."""

    kernel: object
    args: tuple
    kwargs: dict


class Recorder:
    """Stands in for a kernel, and notes its launches."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, args, kwargs))


def recorded(run, *kernels) -> list[Launch]:
    """The launches that run() makes of kernels, each a module and a name in it, on CPU tensors."""
    launches = []
    with ExitStack() as patches:
        for module, name in kernels:
            recorder = Recorder(getattr(module, name), launches)
            patches.enter_context(patch.object(module, name, recorder))
        run()
    return launches


def sampler_launch(precision: str, hidden_dim: int, tile: Tile) -> Launch:
    fused = sampler.FusedSampler(
        DiffusionPolicy(STATE_DIM, ACTION_DIM, hidden_dim=hidden_dim), precision
    )
    with patch.object(sampler, "require_tensor", lambda *_: None):  # it would refuse a CPU's
        run = lambda: fused(torch.zeros(BATCH, STATE_DIM), tile=tile)  # noqa: E731
        (launch,) = recorded(run, (sampler, "_sampler"))
    return launch


def actor_launch(precision: str, hidden_dim: int, tile: Tile) -> Launch:
    networks = (
        network(STATE_DIM, ACTION_DIM, hidden_dim=hidden_dim)
        for network in (DiffusionPolicy, TwinCritic)
    )
    fused = actor.FusedActor(*networks, CANDIDATES, precision)
    with patch.object(actor, "require_tensor", lambda *_: None):
        run = lambda: fused(torch.zeros(BATCH, STATE_DIM), tile=tile)  # noqa: E731
        (launch,) = recorded(run, (actor, "_actor"))
    return launch


@lru_cache
def update_launches(arch: int, precision: str, hidden_dim: int) -> list[Launch]:
    """Each of LAUNCHES on sm_{arch}."""
    agent = DiffusionQL(STATE_DIM, ACTION_DIM, hidden_dim=hidden_dim)
    kernels = [(training, name) for name in ("sample", "fit", "climb")]
    kernels += [(gradients, "weight_gradients"), (gradients, "time_gradient")]
    kernels += [(optimizer, "adam"), (optimizer, "finish")]
    with patch.object(launches, "multiprocessors", lambda _: 132):  # an H100's
        fused = launches.Launches([agent], BATCH, precision, arch)
    data = training.Columns(*[torch.zeros(1000, 1)] * 5)
    found = recorded(lambda: fused.update(data), *kernels)
    names = [launch.kernel.fn.__name__ for launch in found]
    assert names == [name.split()[0] for name in LAUNCHES]
    return found


def cases(arch: int, hidden_dims=HIDDEN_DIMS) -> dict:
    """{name: a function that gives its Launch}, for all tiles, widths, precisions of sm_{arch}."""
    found = {}
    for size, n in BATCHES.items():
        for H in hidden_dims:
            for precision in PRECISIONS:
                tile = choose_tile(n, precision, arch, H)
                n_states = max(1, n // CANDIDATES)
                actor_tile = choose_actor_tile(n_states, CANDIDATES, precision, arch, H)
                for name, launch, chosen in (
                    ("sampler", sampler_launch, tile),
                    ("actor", actor_launch, actor_tile),
                ):
                    how = precision, H, chosen
                    case = f"{name} {size} {H} {precision}"
                    found[case] = lambda launch=launch, how=how: launch(*how)
    for H in hidden_dims:
        for precision in PRECISIONS:
            for i, name in enumerate(LAUNCHES):
                if name == "adam critic":
                    continue  # the policy's with other constants
                how = arch, precision, H
                case = f"update {name} {H} {precision}"
                found[case] = lambda i=i, how=how: update_launches(*how)[i]
    return found


def tile_of(launch: Launch) -> dict:
    """How a launch's work is cut up."""
    values = dict(zip(launch.kernel.arg_names, launch.args))
    tile = values["tile"]._asdict() if "tile" in values else {}
    return tile | {"warps": launch.kwargs.get("num_warps", 4)}


def compile_for(arch: int, launch: Launch) -> dict:
    """Compile a kernel as its launch on sm_{arch} would. -> what was found"""
    kernel, target = launch.kernel, GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    # What JITFunction.run() does up to the compiler, which needs no device.
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.kwargs)
    options, *source = kernel._pack_args(backend, options, bound, specialization, options)
    compiled = triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        path = os.pathsep.join([str(TOOLS), os.environ["PATH"]])
        sass, usage = (
            subprocess.run(
                [TOOLS / "cuobjdump", what, file.name],
                capture_output=True, text=True, check=True, env={**os.environ, "PATH": path},
            ).stdout
            for what in ("-sass", "-res-usage")
        )  # fmt: skip
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # Registers that were given to inline assembly and hold nothing.
    undefined = len(re.findall(r"asm.*\b(?:undef|poison)\b", compiled.asm["llir"]))
    return {
        "arch": arch,
        "tile": tile_of(launch),
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "undefined": undefined,
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M)),
        **{name: len(re.findall(rf"\b{name}\b", sass)) for name in COUNTED},
    }


def compile_case(arch: int, name: str) -> dict:
    return {"case": name, **compile_for(arch, cases(arch)[name]())}


@steady_output()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = *ARCHITECTURES, *LITTLE_MEMORY
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), choices=known)
    patterns = "cases in whose name one of these patterns is found"
    parser.add_argument("--only", nargs="+", default=[""], help=patterns)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    add_results_option(parser, "bench")
    options = parser.parse_args(argv)
    todo = [
        (arch, name)
        for arch in options.arch
        for name in cases(arch)
        if any(re.search(part, name) for part in options.only)
    ]
    everything = len(todo) == sum(len(cases(arch)) for arch in ARCHITECTURES)
    if everything:
        make_folder(options.out)
    found = []
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for result in pool.map(compile_case, *zip(*todo)):
            print(json.dumps(result), flush=True)
            found.append(result)
    if everything:
        path = options.out / "offline.json"
        save_json(path, {**describe(), "triton": triton.__version__, "cases": found})
        print(f"{len(found)} cases in {path}", file=sys.stderr)  # stdout is JSON


if __name__ == "__main__":
    sys.exit(main())

"""What the benchmarks do alike: contestants take turns, ceilings are measured beside them, figures go to one JSON and one CSV."""

import argparse
import csv
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trainer.folder import save_json
from trainer.provenance import describe

RESULTS = Path(__file__).parent / "results"
QUANTILES = ("p20", "p50", "p80")
ORIGIN = ("date", "commit", "device", "torch")
MIN_SAMPLE_MS = 1.0  # on a GPU: a sample is as many calls as it takes, since events are half a microsecond coarse


def parse_options(doc: str, quick: str, argv: list[str] | None) -> argparse.Namespace:
    """What bench.sampling and bench.acting are asked for: quick, device, threads (set), out."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads, where it runs on a CPU"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    return options


def time_calls(call: Callable, n: int, device: torch.device) -> float:
    """Milliseconds a call, n calls on end: by the host's clock on a CPU, by events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(n):
            call()
        return (time.perf_counter() - start) * 1e3 / n
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(n):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / n


def measure(calls: dict, seconds: float, device="cpu", min_rounds: int = 5) -> dict:
    """Interleaved rounds of all calls for about `seconds`. -> name: {"p20", "p50", "p80"} in ms, "rounds" and "ratio".

    A round times each call once, so that a busy moment of the machine meets them all. ratio: the first call's median over its own.
    """
    device, repeats = torch.device(device), {}
    for name, call in calls.items():
        call()
        once = max(time_calls(call, 1, device), 1e-3)
        repeats[name] = 1 if device.type == "cpu" else max(1, round(MIN_SAMPLE_MS / once))
    times, end = {name: [] for name in calls}, time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < min_rounds:
        for name, call in calls.items():
            times[name].append(time_calls(call, repeats[name], device))
    percentiles = {
        name: np.percentile(t, [20, 50, 80]).round(6).tolist() for name, t in times.items()
    }
    first = next(iter(percentiles.values()))
    return {
        name: dict(zip(QUANTILES, p), rounds=len(times[name]), ratio=round(first[1] / p[1], 3))
        for name, p in percentiles.items()
    }


def peaks(device) -> dict:
    """This device's ceilings, by a large copy (bytes read plus written) and large matrix products: GB/s and TFLOP/s."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    x = torch.randn((1 << 29) if on_gpu else (1 << 25), device=device)
    y = torch.empty_like(x)
    found = {
        "copy GB/s": 2
        * x.numel()
        * 4
        / measure({"copy": lambda: y.copy_(x)}, 0.5, device)["copy"]["p50"]
        / 1e6
    }
    n = 8192 if on_gpu else 2048
    a, b = torch.randn(2, n, n, device=device).unbind()
    halves = a.half(), b.half()
    products = {"fp32": (a, b)} | ({"tf32": (a, b), "fp16": halves} if on_gpu else {})
    before = torch.get_float32_matmul_precision()
    try:
        for name, (left, right) in products.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            ms = measure({"product": lambda: left @ right}, 0.5, device)["product"]["p50"]
            found[f"{name} TFLOP/s"] = 2 * n**3 / ms / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: round(value, 3) for name, value in found.items()}


def ceiling(found: dict, precision: str) -> float | None:
    """TFLOP/s that products at this precision could reach: fp16x3 makes three of each."""
    known = found.get(f"{precision.removesuffix('x3')} TFLOP/s")
    return known and (known / 3 if precision == "fp16x3" else known)


def device_name(where: dict) -> str:
    return where["gpu"] or where["cpu"]


def device_slug(where: dict) -> str:
    """A file name's part for the device: cpu, or h100, a100, h200, ..."""
    models = re.findall(r"[A-Za-z]+\d+\w*", where["gpu"] or "")
    return (models or ["gpu"])[0].lower() if where["gpu"] else "cpu"


class Figures:
    """A benchmark's figures, on disk as soon as they are known: this run's in out/{name}_{device}.json, a line each in out/{name}.csv.

    What fails is left out, and named at once and in the end: one contestant's failure costs no other its figure. more: what the
    JSON says beside the figures. Its "finished" tells a whole run from one that was ended early.
    """

    def __init__(self, name: str, columns: list[str], out: Path = RESULTS, **more):
        self.where, self.columns, self.more, self.figures, self.failures = (
            describe(),
            columns,
            more,
            [],
            [],
        )
        self.path, self.table = out / f"{name}_{device_slug(self.where)}.json", out / f"{name}.csv"

    def attempt(self, what: str, make: Callable):
        """make(), or None where it fails."""
        try:
            return make()
        except (Exception, SystemExit) as e:
            why = str(e).partition("\n")[0] or type(e).__name__
            self.failures.append({"what": what, "why": why})
            print(f"FAILED: {what}: {why}", flush=True)

    def time(self, what: str, calls: dict, seconds: float, device) -> dict:
        """measure() of calls that have been tried; nothing where it fails."""
        return (
            (self.attempt(f"timing {what}", lambda: measure(calls, seconds, device)) or {})
            if calls
            else {}
        )

    def add(self, figures: list[dict], **more) -> None:
        origin = {key: self.where[key] for key in ("date", "commit", "torch")} | {
            "device": device_name(self.where)
        }
        self.figures += figures
        self.more |= more
        self._save(finished=False)
        new = not self.table.exists()
        with self.table.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*ORIGIN, *self.columns])
            if new:
                writer.writeheader()
            writer.writerows(
                origin | {key: figure.get(key) for key in self.columns} for figure in figures
            )

    def finish(self) -> int:
        """-> the exit status: whether anything failed."""
        self._save(finished=True)
        print(f"{len(self.figures)} figures in {self.path}")
        for failure in self.failures:
            print(f"FAILED: {failure['what']}: {failure['why']}")
        return int(bool(self.failures))

    def _save(self, finished: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"finished": finished, "failures": self.failures, "figures": self.figures}
        save_json(self.path, {**self.where, **self.more, **found})

"""What the benchmarks share: timing in turns, the device's ceilings, figures in JSON and CSV."""

import argparse
import csv
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.folders import add_results_option, make_folder
from trainer.folder import save_json
from trainer.provenance import describe

QUANTILES = ("p20", "p50", "p80")
ORIGIN = ("date", "commit", "device", "torch")
# On a GPU a sample is as many calls as take this long: events are only good to half a microsecond.
MIN_SAMPLE_MS = 1.0


def options_parser(doc: str, quick: str) -> argparse.ArgumentParser:
    """--quick, --device and --out. doc: the benchmark's docstring; quick: help for --quick."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=torch.device, default=default)
    add_results_option(parser, "bench")
    return parser


def parse_options(doc: str, quick: str, argv: list[str] | None) -> argparse.Namespace:
    """The options of bench.sampling and bench.acting. Sets the number of threads, makes --out."""
    parser = options_parser(doc, quick)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; default 1")
    options = parser.parse_args(argv)
    make_folder(options.out)
    torch.set_num_threads(options.threads)
    return options


def time_calls(call: Callable, n: int, device: torch.device) -> float:
    """Milliseconds per call over n calls in a row: the host's clock on a CPU, events on a GPU."""
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
    """Time all calls in interleaved rounds for about `seconds`.

    A round times each call once, so that a busy moment of the machine affects all of them. Returns
    for each name "p20", "p50" and "p80" in ms, the number of "rounds", and "ratio": the first
    call's median over its own.
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
    found = {}
    for name, t in times.items():
        quantiles = np.percentile(t, [20, 50, 80]).round(6).tolist()
        found[name] = dict(zip(QUANTILES, quantiles), rounds=len(t))
    first = next(iter(found.values()))["p50"]
    for t in found.values():
        t["ratio"] = round(first / t["p50"], 3)
    return found


def peaks(device) -> dict:
    """This device's ceilings: GB/s of a large copy (bytes read plus written), and TFLOP/s of large
    matrix products at each precision."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"

    def median_ms(call):
        return measure({"call": call}, 0.5, device)["call"]["p50"]

    x = torch.randn((1 << 29) if on_gpu else (1 << 25), device=device)
    y = torch.empty_like(x)
    found = {"copy GB/s": 2 * 4 * x.numel() / median_ms(lambda: y.copy_(x)) / 1e6}
    n = 8192 if on_gpu else 2048
    a, b = torch.randn(2, n, n, device=device).unbind()
    products = {"fp32": (a, b)}
    if on_gpu:
        products |= {"tf32": (a, b), "fp16": (a.half(), b.half())}
    before = torch.get_float32_matmul_precision()
    try:
        for name, (left, right) in products.items():
            torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
            found[f"{name} TFLOP/s"] = 2 * n**3 / median_ms(lambda: left @ right) / 1e9
    finally:
        torch.set_float32_matmul_precision(before)
    return {name: round(value, 3) for name, value in found.items()}


def ceiling(ceilings: dict, precision: str) -> float | None:
    """TFLOP/s that products at this precision could reach; fp16x3 makes three fp16 products of
    each. ceilings: what peaks() returned. None if they do not include the precision."""
    known = ceilings.get(f"{precision.removesuffix('x3')} TFLOP/s")
    return known and (known / 3 if precision == "fp16x3" else known)


def precision_of(variant: str) -> str:
    """Of a variant's matrix products, by its name: "fused PRECISION, ...", or any other: fp32."""
    first = variant.split(",")[0]
    return first.removeprefix("fused ") if first.startswith("fused ") else "fp32"


def speed(flops: float, ms: float, precision: str, ceilings: dict) -> dict:
    """TFLOP/s of a call of so many operations ("tflops"), and their "share" of the ceiling."""
    tflops, most = flops / ms / 1e9, ceiling(ceilings, precision)
    return {"tflops": round(tflops, 4), "share": most and round(tflops / most, 4)}


def speed_text(figure: dict, rate: str) -> str:
    """The end of a figure's printed line; rate: the name of its rate, like "actions_per_s"."""
    share = "" if figure["share"] is None else f"{figure['share']:7.1%}"
    unit = rate.replace("_per_", "/")
    speeds = f"{figure['ratio']:8.2f}x {figure['tflops']:8.2f} TFLOP/s {share:7s}"
    return f"{figure['p50']:10.4f} ms {figure[rate]:13,} {unit} {speeds}"


def device_name(where: dict) -> str:
    return where["gpu"] or where["cpu"]


def device_slug(where: dict) -> str:
    """The device in a file's name: cpu, or h100, a100, h200, ..."""
    models = re.findall(r"[A-Za-z]+\d+\w*", where["gpu"] or "")
    return (models or ["gpu"])[0].lower() if where["gpu"] else "cpu"


class Figures:
    """A benchmark's figures, written to disk as soon as they are known.

    This run's go to out/{name}_{device}.json, and each is also a line appended to out/{name}.csv.
    more: what the JSON holds beside the figures. Its "finished" is true if the run was not ended
    early. A variant that fails is left out, and reported at once and at the end; the others are
    still measured.
    """

    def __init__(self, name: str, columns: list[str], out: Path, **more):
        self.where = describe()
        self.columns, self.more = columns, more
        self.figures, self.failures = [], []
        self.path = out / f"{name}_{device_slug(self.where)}.json"
        self.table = out / f"{name}.csv"

    def attempt(self, what: str, make: Callable):
        """make(), or None if it fails."""
        try:
            return make()
        except (Exception, SystemExit) as e:
            why = str(e).partition("\n")[0] or type(e).__name__
            self.failures.append({"what": what, "why": why})
            print(f"FAILED: {what}: {why}", flush=True)

    def attempt_each(self, what: str, makers: dict) -> dict:
        """Name -> makers[name](), without those that fail."""
        made = {name: self.attempt(f"{what}, {name}", make) for name, make in makers.items()}
        return {name: value for name, value in made.items() if value is not None}

    def time(self, what: str, calls: dict, seconds: float, device) -> dict:
        """measure() of calls that have been tried; empty if there are none or one fails."""
        if not calls:
            return {}
        return self.attempt(f"timing {what}", lambda: measure(calls, seconds, device)) or {}

    def add(self, figures: list[dict], **more) -> None:
        self.figures += figures
        self.more |= more
        self._save(finished=False)
        origin = {key: self.where[key] for key in ("date", "commit", "torch")}
        origin["device"] = device_name(self.where)
        new = not self.table.exists()
        with self.table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*ORIGIN, *self.columns])
            if new:
                writer.writeheader()
            for figure in figures:
                writer.writerow(origin | {key: figure.get(key) for key in self.columns})

    def finish(self) -> int:
        """Save, report failures. Returns the exit status: 1 if anything failed."""
        self._save(finished=True)
        print(f"{len(self.figures)} figures in {self.path}")
        for failure in self.failures:
            print(f"FAILED: {failure['what']}: {failure['why']}")
        return int(bool(self.failures))

    def _save(self, finished: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"finished": finished, "failures": self.failures, "figures": self.figures}
        save_json(self.path, {**self.where, **self.more, **found})

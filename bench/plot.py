"""Pictures of what was measured: sampling and acting over batch size, and the updates/s of each rung of the training ladder.

    python -m bench.plot            # of every device whose figures are in bench/results
    python -m bench.plot cpu h100

Writes bench/results/sampling_DEVICE.png, and of bench.training's figures training_DEVICE.png.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from atomic import written_whole
from bench.timing import RESULTS, device_name

FUSED, EAGER, COMPILED = ("#0072b2", "#56b4e9", "#009e73", "#004b87"), ("#d55e00", "#e69f00"), ("#7f7f7f", "#b0b0b0")


def colours(contestants: list[str]) -> dict:
    """Blue for what is fused, red for eager, grey for compiled; dashed lines are for launches in a graph."""
    left = {"fused": list(FUSED), "compiled": list(COMPILED), "eager": list(EAGER)}
    found = {}
    for name in contestants:
        plain = name.removesuffix(", graph")
        kind = "fused" if name.startswith("fused") or name == "dql" else "compiled" if "compile" in name else "eager"
        if plain not in found:
            palette = left[kind]
            found[plain] = palette.pop(0) if palette else "black"
        found[name] = found[plain]
    return found


def lines(axes, figures: list[dict], x: str, y: str) -> None:
    names = list(dict.fromkeys(f["contestant"] for f in figures))
    colour = colours(names)
    for name in names:
        points = sorted((f[x], f[y]) for f in figures if f["contestant"] == name)
        style = "--" if name.endswith(", graph") else "-"
        axes.plot(*zip(*points), style, marker="o", markersize=3.5, linewidth=1.4, color=colour[name], label=name)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)


def draw(sampled: dict, acted: dict | None, path: Path) -> None:
    figures = [f for f in sampled["figures"] if f["T"] == 5]
    panels = 3 if acted else 2
    figure = Figure(figsize=(4.9 * panels, 4.6), layout="constrained")
    time, rate, *more = figure.subplots(1, panels)
    lines(time, figures, "batch", "p50")
    time.set(xlabel="batch", ylabel="ms a call (median)", title="sampling: latency")
    lines(rate, figures, "batch", "actions_per_s")
    rate.set(xlabel="batch", ylabel="actions/s", title="sampling: throughput")
    best = max(figures, key=lambda f: f["actions_per_s"])
    if best["share"]:
        most = best["actions_per_s"] / best["share"]
        rate.axhline(most, color="black", linewidth=0.8, linestyle=":")
        rate.text(figures[0]["batch"], most, f" matrix products alone, {best['precision']}", va="bottom", fontsize=8)
        rate.set_ylim(top=most * 3)
    for axes in more:
        on_device = [f for f in acted["figures"] if "numpy" not in f["contestant"]]
        lines(axes, on_device, "states", "p50")
        axes.set(xlabel="states", ylabel="ms a call (median)", title=f"acting: best of {acted['candidates']} by Q")
    for axes in (time, *more):
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"{device_name(sampled)}, torch {sampled['torch']}, {sampled['date']}, commit {sampled['commit']}; "
        "state 29, action 8, hidden 256, T = 5",
        fontsize=9,
    )
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_ladder(trained: dict, path: Path) -> None:
    """Updates/s of each rung, with and without max-Q; and where several seeds were measured, of all of them together."""
    most = max(f["threads"] for f in trained["figures"])
    figures = [f for f in trained["figures"] if f["threads"] == most]
    several = [f for f in figures if f["contestant"].startswith("fused")]
    figure = Figure(figsize=(5.2 * (2 if several else 1), 4.4), layout="constrained")
    ladder, *more = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    names = list(dict.fromkeys(f["contestant"] for f in figures if f["seeds"] == 1))
    workloads = list(dict.fromkeys(f["workload"] for f in figures))
    for i, workload in enumerate(workloads):
        rates = {f["contestant"]: f["updates_per_s"] for f in figures if f["workload"] == workload and f["seeds"] == 1}
        at = [names.index(name) + (0.2 if i else -0.2) for name in rates]
        bars = ladder.barh(at, list(rates.values()), height=0.4, color=(FUSED[0], EAGER[0])[i % 2], label=workload)
        ladder.bar_label(bars, [f" {rate:,.0f}" if rate >= 100 else f" {rate:.1f}" for rate in rates.values()], fontsize=8)
    rates = [f["updates_per_s"] for f in figures if f["seeds"] == 1]
    wide = max(rates) > 50 * min(rates)
    ladder.set(xlabel="updates/s, one agent", xscale="log" if wide else "linear", title="the training ladder")
    ladder.set_yticks(range(len(names)), names)
    ladder.invert_yaxis()
    ladder.margins(x=0.2)
    ladder.legend(fontsize=8, frameon=False)
    for axes in more:
        lines(axes, [f for f in several if f["workload"] == workloads[0]], "seeds", "updates_per_s")
        axes.set(xlabel="agents side by side", ylabel="updates/s of all", title="several seeds")
        axes.legend(fontsize=7, frameon=False)
    origin = f"torch {trained['torch']}, {trained['date']}, commit {trained['commit']}"
    figure.suptitle(f"{device_name(trained)}, {origin}; batch 256", fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", help="cpu, h100, ...; default: all that there are")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the figures and pictures")
    options = parser.parse_args(argv)
    there = sorted(p.stem.removeprefix("sampling_") for p in options.results.glob("sampling_*.json"))
    if not there:
        raise SystemExit(f"no sampling_*.json in {options.results}: run python -m bench.sampling first")
    for device in options.devices or there:
        if device not in there:
            raise SystemExit(f"no figures of {device} in {options.results}; there are: {', '.join(there)}")
        sampled, acted = (options.results / f"{what}_{device}.json" for what in ("sampling", "acting"))
        trained = options.results / f"training_{device}.json"
        if trained.exists():
            draw_ladder(json.loads(trained.read_text()), trained.with_suffix(".png"))
            print(trained.with_suffix(".png"))
        path = options.results / f"sampling_{device}.png"
        draw(json.loads(sampled.read_text()), json.loads(acted.read_text()) if acted.exists() else None, path)
        print(path)


if __name__ == "__main__":
    sys.exit(main())

"""Pictures of what was measured: sampling and acting over batch size, and updates/s of training.

    python -m bench.plot                          # every device whose figures are in runs/bench
    python -m bench.plot cpu h100
    python -m bench.plot --results bench/results  # the committed figures

Writes sampling_DEVICE.png and, of bench.training's figures, training_DEVICE.png beside them.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from bench.folders import add_results_option
from bench.timing import device_name
from trainer.folder import saved
from trainer.terminal import steady_output

WIDTH = 8.5  # inches: README and docs/ show pictures 800 pixels wide, there 10 points are 13 pixels
PALETTES = {
    "fused": ["#0072b2", "#56b4e9", "#009e73", "#004b87"],
    "eager": ["#d55e00", "#e69f00"],
    "compiled": ["#7f7f7f", "#b0b0b0"],
}


def colours(variants: list[str]) -> dict:
    """Blue for what is fused, red for eager, grey for compiled; "NAME, graph" has NAME's colour."""
    left, found = {kind: list(palette) for kind, palette in PALETTES.items()}, {}
    for name in variants:
        plain = name.removesuffix(", graph")
        kind = "compiled" if "compile" in name else "eager"
        if name.startswith("fused"):
            kind = "fused"
        if plain not in found:
            found[plain] = left[kind].pop(0) if left[kind] else "black"
        found[name] = found[plain]
    return found


def lines(axes, figures: list[dict], x: str, y: str) -> None:
    """A line for each variant, dashed if its launches are in a CUDA graph."""
    names = list(dict.fromkeys(f["variant"] for f in figures))
    colour = colours(names)
    for name in names:
        points = sorted((f[x], f[y]) for f in figures if f["variant"] == name)
        style = "--" if name.endswith(", graph") else "-"
        how = dict(marker="o", markersize=3.5, linewidth=1.4, color=colour[name], label=name)
        axes.plot(*zip(*points), style, **how)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)


def label(axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)


def legend(figure: Figure, *panels) -> None:
    """One for all panels, below them."""
    named = {name: line for axes in panels for line, name in zip(*axes.get_legend_handles_labels())}
    how = {"loc": "outside lower center", "fontsize": 8, "frameon": False}
    figure.legend(named.values(), named.keys(), ncols=4, **how)


def draw_sampling(sampled: dict, acted: dict | None, path: Path) -> None:
    figures = [f for f in sampled["figures"] if f["T"] == 5]
    panels = 3 if acted else 2
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    time, rate, *more = figure.subplots(1, panels)
    lines(time, figures, "batch", "p50")
    label(time, "sampling: latency", "batch", "ms a call (median)")
    lines(rate, figures, "batch", "actions_per_s")
    label(rate, "sampling: throughput", "batch", "actions/s")
    best = max(figures, key=lambda f: f["actions_per_s"])
    if best["share"]:
        most = best["actions_per_s"] / best["share"]
        name = f"matrix products alone, {best['precision']}"
        rate.axhline(most, color="black", linewidth=0.8, linestyle=":", label=name)
    for axes in more:
        on_device = [f for f in acted["figures"] if "numpy" not in f["variant"]]
        lines(axes, on_device, "states", "p50")
        label(axes, f"acting: best of {acted['candidates']}", "states", "ms a call (median)")
    legend(figure, time, rate, *more)
    save(figure, sampled, "state 29, action 8, hidden 256, T = 5", path)


def draw_training(trained: dict, path: Path) -> None:
    """Updates/s of each variant, with and without max-Q; and if several seeds were measured, of all
    of them together."""
    most = max(f["threads"] for f in trained["figures"])
    figures = [f for f in trained["figures"] if f["threads"] == most]
    several = [f for f in figures if f["variant"].startswith("fused")]
    columns = 2 if several else 1
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    bars, *more = figure.subplots(1, columns, squeeze=False)[0]
    alone = [f for f in figures if f["seeds"] == 1]
    names = list(dict.fromkeys(f["variant"] for f in alone))
    workloads = list(dict.fromkeys(f["workload"] for f in figures))
    for i, workload in enumerate(workloads):
        rates = {f["variant"]: f["updates_per_s"] for f in alone if f["workload"] == workload}
        at = [names.index(name) + (0.2 if i else -0.2) for name in rates]
        colour = (PALETTES["fused"][0], PALETTES["eager"][0])[i % 2]
        drawn = bars.barh(at, list(rates.values()), height=0.4, color=colour, label=workload)
        labels = [f" {r:,.0f}" if r >= 100 else f" {r:.1f}" for r in rates.values()]
        bars.bar_label(drawn, labels, fontsize=8)
    rates = [f["updates_per_s"] for f in alone]
    scale = "log" if max(rates) > 50 * min(rates) else "linear"
    bars.set_xscale(scale)
    label(bars, "training", "updates/s, one agent", "")
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.margins(x=0.2)
    for axes in more:
        first = [f for f in several if f["workload"] == workloads[0]]
        lines(axes, first, "seeds", "updates_per_s")
        label(axes, "several seeds", "agents side by side", "updates/s of all")
    legend(figure, bars, *more)
    save(figure, trained, "batch 256", path)


def save(figure: Figure, measured: dict, sizes: str, path: Path) -> None:
    """With where the figures come from as the title."""
    origin = f"torch {measured['torch']}, {measured['date']}, commit {measured['commit']}"
    title = f"{device_name(measured)}; {sizes}\n{origin}"
    figure.suptitle(title, fontsize=9, parse_math=False)
    with saved(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)
    print(path)


@steady_output()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("devices", nargs="*", help="cpu, h100, ...; default: all that there are")
    add_results_option(parser, "bench", "--results")
    options = parser.parse_args(argv)
    folder = options.results
    there = sorted(p.stem.removeprefix("sampling_") for p in folder.glob("sampling_*.json"))
    if not there:
        raise SystemExit(f"no sampling_*.json in {folder}: run python -m bench.sampling first")
    for device in options.devices or there:
        if device not in there:
            known = ", ".join(there)
            raise SystemExit(f"no figures of {device} in {folder}; there are: {known}")
        sampled, acted, trained = (
            json.loads(path.read_text()) if path.exists() else None
            for path in (folder / f"{w}_{device}.json" for w in ("sampling", "acting", "training"))
        )
        if trained:
            draw_training(trained, folder / f"training_{device}.png")
        draw_sampling(sampled, acted, folder / f"sampling_{device}.png")


if __name__ == "__main__":
    sys.exit(main())

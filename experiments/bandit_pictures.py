"""The bandit's table and pictures, from samples and figures. Called by bandit.py."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from experiments.bandit_data import CORNERS, NAMES, REWARDS, SIGMA
from experiments.bandit_policies import CLIMBING, CLONING, DIFFUSION
from trainer.folder import saved
from trainer.scores import mean_and_spread

CRITICS_FIRST = "Diffusion-QL, critics first"
SHOWN = 100  # samples of a policy that climbs Q, as in the paper
WIDTH = 8.5  # inches: README and docs/ show pictures 800 pixels wide, there 10 points are 13 pixels
CLONES, CLIMBS = "#0072b2", "#d55e00"
CORNER_COLUMNS = [f"{name}\npays {reward:g}" for name, reward in zip(NAMES, REWARDS)]
LAST_COLUMNS = ["outside", "mean\nreward", "MMD\nto the data", "CPU s\nto train"]
HEADER = ["% of samples", *CORNER_COLUMNS, *LAST_COLUMNS]


def table(results: dict) -> list[list[str]]:
    """name -> its runs: a line each. The MMD only of policies that should resemble the data."""
    lines, spread = [], mean_and_spread
    for name, runs in results.items():
        line = [name, *(spread([100 * run["shares"][c] for run in runs]) for c in NAMES)]
        line.append(spread([100 * run["outside"] for run in runs]))
        line.append(spread([run["reward"] for run in runs], 2))
        climbs = name in (*CLIMBING, CRITICS_FIRST)
        line.append("" if climbs else spread([run["mmd"] for run in runs], 3))
        line.append("" if name == "data" else spread([run["cpu_s"] for run in runs], 0))
        lines.append(line)
    return lines


def panel(axes, samples, title, colour) -> None:
    axes.scatter(*samples.T, s=4, alpha=0.35, color=colour, linewidths=0)
    for corner in CORNERS:
        axes.add_patch(Circle(corner, 3 * SIGMA, fill=False, linewidth=0.6, color="0.6"))
    beyond = (np.abs(samples) > 1.2).any(axis=1).mean()
    if beyond:
        box = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1.0)
        text = f"{100 * beyond:.0f} % not shown"
        axes.text(0, -1.16, text, ha="center", va="bottom", fontsize=8, bbox=box)
    ticks = (-0.8, 0, 0.8)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=ticks, yticks=ticks)
    axes.tick_params(labelsize=8, length=2)
    axes.label_outer()
    axes.set_title(title, fontsize=9)


def write_table(axes, lines, ruled) -> None:
    """Text in columns, with a rule above each of the lines numbered in ruled."""
    axes.set(xlim=(0, 1), ylim=(len(lines) + 0.3, -1.6))
    axes.axis("off")
    columns = [0.0, *np.linspace(0.255, 0.96, len(HEADER) - 1)]
    for y, line in enumerate([HEADER, *lines], start=-1):
        how = dict(va="center", fontsize=8, color="0.25" if y < 0 else "black")
        at, name = y + (0.2 if y < 0 else 0.5), line[0]
        weight = "bold" if name in (*DIFFUSION, CRITICS_FIRST) else "normal"
        axes.text(columns[0], at, name, weight=weight, **how)
        for x, text in zip(columns[1:], line[1:]):
            axes.text(x, at, text, ha="center", **how)
    for y in (0, *ruled, len(lines)):
        axes.axhline(y, color="black", linewidth=0.6)


def draw(samples: dict, results: dict, data, note: str, path: Path) -> None:
    """The data and the cloning policies, the rewards and the climbing ones, and the table.

    samples: name -> (n,2); results: name -> its runs
    """
    rows = [CLONING, (*CLIMBING, CRITICS_FIRST)]
    rows = [[name for name in row if name in samples] for row in rows]
    rows = [row for row in rows if row]
    columns = max(5, 1 + max(len(row) for row in rows))
    lines = table(results)
    heights = [WIDTH / columns + 0.45] * len(rows) + [0.2 * (len(lines) + 2)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), layout="constrained")
    *pictures, below = figure.subfigures(len(heights), 1, height_ratios=heights)
    for row, picture in zip(rows, pictures):
        first, *others = picture.subplots(1, columns)
        if row[0] in CLONING:
            panel(first, data, "data", "0.25")
        else:
            panel(first, data, "reward", "0.75")
            for corner, reward in zip(CORNERS, REWARDS):
                at = 0.55 * corner
                first.text(*at, f"{reward:g}", ha="center", va="center", fontsize=10)
        for axes, name in zip(others, row):
            clones = name in CLONING
            shown = samples[name] if clones else samples[name][:SHOWN]
            panel(axes, shown, name.replace(", ", ",\n"), CLONES if clones else CLIMBS)
        for axes in others[len(row) :]:
            axes.axis("off")
    write_table(below.subplots(), lines, ruled=[1] + [1 + len(row) for row in rows[:-1]])
    save(figure, note, path)


def draw_steps(samples: dict, results: dict, data, note: str, path: Path) -> None:
    """BC-Diffusion by its number of steps. samples, results: T -> (n,2), runs"""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(samples))
    panel(first, data, "data", "0.25")
    for axes, (n_timesteps, drawn) in zip(others, samples.items()):
        panel(axes, drawn, f"T = {n_timesteps}", CLONES)
        runs = results[n_timesteps]
        outside = mean_and_spread([100 * run["outside"] for run in runs])
        distance = mean_and_spread([run["mmd"] for run in runs], 3)
        axes.set_xlabel(f"outside: {outside} %\nMMD: {distance}", fontsize=8)
    save(figure, note, path)


def draw_training(results: dict, updates: dict, note: str, path: Path) -> None:
    """Training curves of Diffusion-QL, one a seed. results: name -> its runs; updates: how many"""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, runs) in zip(panels, results.items()):
        for run in runs:
            at_best = [100 * found[NAMES[-1]] for found in run["course"]]
            steps = np.linspace(0, updates[name], len(at_best) + 1)[1:]
            axes.plot(steps, at_best, linewidth=1.2, label=f"seed {run['seed']}")
        axes.set(xlim=(0, updates[name]), ylim=(0, 100))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("updates", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% of samples within 3σ\nof the best corner", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    save(figure, note, path)


def save(figure: Figure, note: str, path: Path) -> None:
    figure.suptitle(note, fontsize=9, color="0.35", parse_math=False)
    with saved(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)

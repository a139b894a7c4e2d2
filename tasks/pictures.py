"""Pictures of an evaluation's episodes: their returns, or their paths through a maze."""

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Circle

from .antmaze import CELL, GOAL_RADIUS, MAZES, MazeEpisodes, cell_xy
from .task import Episodes, one_line

LINE, END, EXPERT = "#0072b2", "#d55e00", "#555555"
FLOOR, WALL, GOAL, START = "#f7f5f0", "#8d99ae", "#2a9d5c", "#222222"
REACHED, FAILED = "#0072b2", "#d55e00"
TITLE_SIZE = 9  # points
TITLE_WIDTH = 100  # characters; longer lines are wrapped


def draw_returns(episodes: Episodes, expert: float, title: str) -> Figure:
    """Each episode's return so far, step by step, with a dot where it was terminated."""
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    axes = figure.add_subplot(xlabel="environment step", ylabel="return so far")
    faint = float(np.interp(len(episodes.rewards), [10, 100], [0.8, 0.35]))
    edge = {"markeredgecolor": "white", "markeredgewidth": 0.5}
    for rewards, over in zip(episodes.rewards, episodes.terminated):
        total = np.concatenate([[0.0], np.cumsum(rewards)])
        axes.plot(total, color=LINE, linewidth=1.0, alpha=faint)
        if over:
            axes.plot(len(rewards), total[-1], "o", color=END, markersize=4, **edge)
    ended = f"terminated: {int(episodes.terminated.sum())} of {len(episodes.returns)}"
    axes.plot([], [], color=LINE, linewidth=1.0, label="an episode")
    axes.plot([], [], "o", color=END, markersize=4, label=ended)
    # Show the expert's return only where it does not squeeze the rest.
    if expert < 2 * max(episodes.returns.max(), 1e-9):
        line = {"color": EXPERT, "linewidth": 0.8, "linestyle": "--"}
        axes.axhline(expert, **line, label="D4RL's expert")
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    add_title(figure, title)
    add_legend(figure, axes)
    return figure


def draw_maze(maze: str, episodes: MazeEpisodes, title: str) -> Figure:
    """The maze from above, with every episode's path and goal.

    Goals differ, so a path that failed may lead through another's goal. A thin black line shows
    what it missed its own by.
    """
    walls = np.array([[mark == "1" for mark in row] for row in MAZES[maze]])
    n_rows, n_cols = walls.shape
    left, bottom = np.array(cell_xy(maze, 0, 0)) - CELL / 2
    extent = (left, left + CELL * n_cols, bottom, bottom + CELL * n_rows)

    height = 7.0 * (n_rows - 1.5) / (n_cols - 1.5) + 0.75
    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.add_subplot(xlabel="x (m)", ylabel="y (m)")
    axes.imshow(walls, cmap=ListedColormap([FLOOR, WALL]), extent=extent, origin="lower")

    reached = episodes.returns > 0
    width = float(np.interp(len(reached), [10, 100], [1.6, 0.7]))  # thin if there are many
    found = {"color": GOAL, "alpha": max(0.05, 0.5 / len(reached) ** 0.5), "linewidth": 0}
    missed = {"edgecolor": FAILED, "fill": False, "linewidth": width / 2, "zorder": 2.5}
    for goal, is_reached in zip(episodes.goals, reached):
        axes.add_patch(Circle(goal, GOAL_RADIUS, **(found if is_reached else missed)))
    kinds = ((reached, REACHED, "reached the goal"), (~reached, FAILED, "did not reach it"))
    for chosen, colour, label in kinds:
        paths = [episodes.paths[i] for i in np.flatnonzero(chosen)]
        axes.add_collection(LineCollection(paths, colors=colour, linewidths=width, alpha=0.75))
        ends = np.array([path[-1] for path in paths]).reshape(-1, 2)
        dots = {"s": 14, "color": colour, "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        axes.scatter(*ends.T, **dots, label=f"{label}: {len(paths)}")
    gaps = LineCollection(near_misses(episodes), colors=START, linewidths=0.6, zorder=2.6)
    axes.add_collection(gaps)
    start = np.mean([path[0] for path in episodes.paths], axis=0)
    star = {"marker": "*", "s": 130, "color": START, "edgecolors": "white", "zorder": 4}
    axes.scatter(*start, **star, label="start")
    axes.scatter([], [], color=GOAL, alpha=0.5, label="goals")
    axes.scatter([], [], facecolors="none", edgecolors=FAILED, label="missed goals")
    rim = 0.75 * CELL  # crop the outer walls
    axes.set(xlim=(extent[0] + rim, extent[1] - rim), ylim=(extent[2] + rim, extent[3] - rim))
    axes.locator_params(steps=[2, 4, 8])
    axes.spines[:].set_visible(False)
    add_title(figure, title)
    legend = add_legend(figure, axes)
    for handle in legend.legend_handles:
        handle.set_sizes([90])
    return figure


def near_misses(episodes: MazeEpisodes) -> list[np.ndarray]:
    """Of each failed path that came within a cell of its goal: its nearest point, and the goal.

    -> arrays (2, 2)
    """
    ways = []
    for path, goal, total in zip(episodes.paths, episodes.goals, episodes.returns):
        distances = np.linalg.norm(path - goal, axis=1)
        if total == 0 and distances.min() < CELL:
            ways.append(np.stack([path[distances.argmin()], goal]))
    return ways


def add_legend(figure: Figure, axes: Axes):
    """Below the axes, where it covers nothing."""
    labels = axes.get_legend_handles_labels()
    narrow = {"ncols": 5, "fontsize": 9, "columnspacing": 1.4, "handletextpad": 0.4}
    return figure.legend(*labels, loc="outside lower center", frameon=False, **narrow)


def add_title(figure: Figure, title: str) -> None:
    """Plain text at the top, wrapped and shrunk to the figure's width.

    A character that the font lacks, which matplotlib would warn of, becomes a question mark.
    """
    font = get_font(findfont(FontProperties()))
    lines = []
    for line in title.splitlines():
        shown = (mark if font.get_char_index(ord(mark)) else "?" for mark in one_line(line))
        lines += textwrap.wrap("".join(shown), TITLE_WIDTH)
    text = figure.suptitle("\n".join(lines), fontsize=TITLE_SIZE, parse_math=False)
    share = text.get_window_extent().width / figure.bbox.width
    text.set_fontsize(TITLE_SIZE / max(1.0, share / 0.98))

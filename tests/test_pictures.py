"""tasks/pictures.py: legends, titles and missed goals in the pictures of episodes."""

import warnings

import numpy as np
import pytest
from legible import assert_legible

import tasks
from tasks import Episodes
from tasks.antmaze import MazeEpisodes, sample_goals
from tasks.pictures import FAILED, REACHED, draw_maze, draw_returns

TITLE = "antmaze-umaze-v0, update 15,000: score 55.3\ngenerated"


def straight_lines(n: int, length: int = 1000, slope: float = 3.3) -> Episodes:
    """n episodes with constant rewards, every second one terminated."""
    rewards = [np.full(length, slope * (1 - 0.02 * i)) for i in range(n)]
    returns, ended = np.array([each.sum() for each in rewards]), np.arange(n) % 2 == 1
    return Episodes(returns, np.full(n, length), ended, rewards)


def maze_episodes(paths: list, goals, reached) -> MazeEpisodes:
    paths = [np.array(path, float) for path in paths]
    lengths = np.array([len(path) - 1 for path in paths])
    returns = np.array(reached, float)
    rewards = [np.zeros(length) for length in lengths]
    return MazeEpisodes(returns, lengths, returns > 0, rewards, paths, np.array(goals, float))


def many_in(maze: str, n: int) -> MazeEpisodes:
    goals = sample_goals(maze, n, np.random.default_rng(0))
    paths = [np.linspace([0.0, 0.0], goal, 50) for goal in goals]
    return maze_episodes(paths, goals, np.arange(n) % 3 > 0)


def test_the_legend_of_returns_covers_no_line():
    """Nor the expert's, which would go through one at the top left."""
    figure = draw_returns(straight_lines(10), 3234.3, TITLE)
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert axes.get_legend() is None and len(axes.lines) > 10
    assert not legend.get_window_extent().overlaps(axes.get_tightbbox())
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["an episode", "terminated: 5 of 10", "D4RL's expert"]


@pytest.mark.parametrize("n", [1, 10, 100])
@pytest.mark.parametrize("maze", ["umaze", "medium", "large"])
def test_a_picture_of_a_maze_can_be_read(tmp_path, monkeypatch, maze, n):
    task = next(task for task in map(tasks.get, tasks.names()) if getattr(task, "maze", "") == maze)
    path = tmp_path / "paths.png"
    assert_legible(lambda: task.draw(many_in(maze, n), path, TITLE), path, monkeypatch)


@pytest.mark.parametrize("n", [1, 100])
def test_a_picture_of_returns_can_be_read(tmp_path, monkeypatch, n):
    task, path = tasks.get("hopper-medium-v2"), tmp_path / "returns.png"
    assert_legible(lambda: task.draw(straight_lines(n), path, TITLE), path, monkeypatch)


def test_a_missed_goal_is_joined_to_the_path_that_missed_it():
    """Where the path was nearest; not if it never came near. Its goal is a ring."""
    paths = [
        [[0, 0], [0, 8]],
        [[0, 0], [1, 6.5], [4, 7]],  # nearest in its middle
        [[0, 0], [1, 1]],  # never near
    ]
    episodes = maze_episodes(paths, [[0, 8], [1, 8], [1, 9]], [1, 0, 0])
    (axes,) = draw_maze("umaze", episodes, TITLE).axes
    done, failed, gaps = (collection.get_segments() for collection in axes.collections[:5:2])
    np.testing.assert_array_equal(done, [paths[0]])
    assert [path.tolist() for path in failed] == paths[1:]
    np.testing.assert_array_equal(gaps, [[[1, 6.5], [1, 8]]])
    rings = [tuple(circle.center) for circle in axes.patches if not circle.get_fill()]
    assert rings == [(1, 8), (1, 9)] and len(axes.patches) == 3
    assert REACHED != FAILED


TITLES = [
    "plain",
    "$5 and $\\frac{",
    "data\u6570\u636e and \U0001f600",
    "a\tb\x1b[31m\udcff",
    "one\ntwo " + "/a/very/long/path" * 20,
    "W" * 400,
    "",
]


@pytest.mark.parametrize("title", TITLES)
def test_a_title_is_plain_text_inside_the_picture(tmp_path, title):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task, episodes = tasks.get("antmaze-umaze-v0"), many_in("umaze", 3)
        task.draw(episodes, tmp_path / "maze.png", title)
        figure = draw_returns(straight_lines(3), 3234.3, title)
        figure.savefig(tmp_path / "returns.png")
    box, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert box.x0 >= 0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
    shown = "".join(figure._suptitle.get_text().split())
    missing = str.maketrans(dict.fromkeys("\u6570\u636e\x1b\udcff", "?"))
    assert shown == "".join(title.translate(missing).split())

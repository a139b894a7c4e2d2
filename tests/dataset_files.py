"""Files in D4RL's layout, antmaze trajectories with known ends, and a slow loop that reads them."""

import dataclasses

import h5py
import numpy as np
import pytest

import tasks
from tasks import hdf5
from tasks.task import TaskError

TASK = dataclasses.replace(
    tasks.get("antmaze-umaze-v0"), episode_limit=7, dataset_file="ant_maze_new/Ant_maze.hdf5"
)
STEP = 0.25  # metres an ant walks here in a step


def arrays(n=50, seed=0, timeouts=True, state_dim=29, action_dim=8):
    rng = np.random.default_rng(seed)
    made = {
        "observations": rng.standard_normal((n, state_dim), np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n, np.float32),
        "terminals": rng.random(n) < 0.2,
    }
    return made | ({"timeouts": rng.random(n) < 0.2} if timeouts else {})


def write(path, made, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in made.items():
            file.create_dataset(key, data=value, **options)
    return path


def transitions(made, rows):
    """What a reader returns if it takes these rows: indices or a mask."""
    rows = np.arange(len(made["rewards"]))[rows]
    return {
        "observations": made["observations"][rows],
        "actions": made["actions"][rows],
        "next_observations": made["observations"][rows + 1],
        "rewards": made["rewards"][rows],
        "terminals": made["terminals"][rows],
    }


def read_slowly(made, limit):
    """D4RL's rule, one row at a time: a timeout is cut, or without timeouts the limit-th step."""
    rows, step = [], 0
    for i in range(len(made["rewards"]) - 1):
        cut = made["timeouts"][i] if "timeouts" in made else step == limit - 1
        if cut:
            step = 0
            continue
        step = 1 if made["terminals"][i] else step + 1
        rows.append(i)
    return transitions(made, np.array(rows, int))


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value, err_msg=key)
        assert read[key].dtype == (bool if key == "terminals" else np.float32), key


def quiet(line):
    pass


def error_of(call, *args, **kwargs) -> str:
    """The message of the TaskError, which must be one line."""
    with pytest.raises(TaskError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- Antmaze trajectories ------------------------------------------------------------------------


def path(start, direction, n):
    """n places (n, 2) from start on, STEP apart."""
    return np.add(start, STEP * np.arange(n)[:, None] * np.array(direction))


def within(xy, goal):
    return np.hypot(*(xy - np.array(goal)).T) <= 0.5


class Walks:
    """Trajectories [(places (T, 2), goal), ...] as a file's arrays, and what is true of each row.

    follows (N,): the next row is of the same trajectory.
    reached (N,): the row's step ends within 0.5 m of its trajectory's goal.
    """

    def __init__(self, trajectories):
        places, goals = zip(*trajectories)
        lengths = [len(xy) for xy in places]
        self.made = arrays(sum(lengths))
        self.made["observations"][:, :2] = np.concatenate(places)
        self.made["infos/goal"] = np.repeat(goals, lengths, axis=0).astype(np.float32)
        self.follows = np.concatenate([np.arange(n) < n - 1 for n in lengths])
        reached = [np.append(within(xy[1:], goal), False) for xy, goal in trajectories]
        self.reached = np.concatenate(reached)
        self.ends = np.flatnonzero(~self.follows)
        self.mark(self.reached)
        self.made["timeouts"] = ~self.follows

    def mark(self, rows):
        """Make these rows (N,) the terminal and rewarded ones."""
        self.made["terminals"], self.made["rewards"] = rows.copy(), rows.astype(np.float32)

    def expected(self, mask, terminals=None):
        """Transitions of the rows in mask (N,); terminals (N,): other ends and rewards."""
        made = self.made
        if terminals is not None:
            made = made | {"terminals": terminals, "rewards": terminals.astype(np.float32)}
        return transitions(made, mask)

    def read(self, tmp_path, repair=True, log=quiet):
        file = write(tmp_path / "walks.hdf5", self.made)
        return hdf5.read_hdf5(file, TASK, repair=repair, log=log)


def four_walks(lengths=(30, 26, 33, 21), goals=((4, 0), (0, 4), (4, 9), (9, 3))):
    """Through a goal and on, up to a goal, away from one, and beside one."""
    starts, directions = ((0, 0), (0, 0), (4, 8), (6, 0)), ((1, 0), (0, 1), (0, -1), (0, 1))
    return [(path(s, d, n), g) for s, d, n, g in zip(starts, directions, lengths, goals)]

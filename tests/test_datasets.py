"""tasks/datasets.py: D4RL's reading rules, the repaired reading, where data come from, and what bad files and bad networks get."""

import errno
import http.server
import os
import socket
import sys
import threading
import tracemalloc
import types
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest

import tasks
from tasks import datasets, fetch
from tasks.task import TaskError


@dataclass(frozen=True)
class Task:
    name: str = "antmaze-umaze-v0"
    state_dim: int = 29
    action_dim: int = 8
    episode_limit: int = 7
    dataset_file: str = "ant_maze_new/Ant_maze.hdf5"
    family: str = "antmaze"
    can_generate: bool = True


TASK = Task()


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


def read_slowly(made, limit):
    """SPEC 6 and D4RL's step counter, one row at a time."""
    transitions, step = [], 0
    for i in range(len(made["rewards"]) - 1):
        cut = made["timeouts"][i] if "timeouts" in made else step == limit - 1
        if cut:
            step = 0
            continue
        step = 1 if made["terminals"][i] else step + 1
        transitions.append(i)
    i = np.array(transitions, int)
    return {
        "observations": made["observations"][i],
        "actions": made["actions"][i],
        "next_observations": made["observations"][i + 1],
        "rewards": made["rewards"][i],
        "terminals": made["terminals"][i],
    }


def quiet(line):
    pass


def assert_same(read, expected):
    assert read.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(read[key], value, err_msg=key)
        assert read[key].dtype == (bool if key == "terminals" else np.float32), key


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(TaskError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("n", [2, 3, 8, 50, 301])
@pytest.mark.parametrize("seed", range(4))
def test_timeouts_are_cut_as_a_slow_loop_cuts_them(tmp_path, n, seed):
    made = arrays(n, seed)
    made["timeouts"][0] = False
    assert_same(datasets.read_hdf5(write(tmp_path / "a.hdf5", made), TASK), read_slowly(made, 7))


@pytest.mark.parametrize("limit", [2, 3, 7, 1000])
@pytest.mark.parametrize("terminal_rate", [0, 0.02, 0.3, 0.9])
def test_without_timeouts_the_episode_limit_cuts_as_a_slow_loop_does(
    tmp_path, limit, terminal_rate
):
    made = arrays(400, timeouts=False)
    made["terminals"] = np.random.default_rng(limit).random(400) < terminal_rate
    expected = read_slowly(made, limit)
    assert_same(
        datasets.read_hdf5(write(tmp_path / "a.hdf5", made), Task(episode_limit=limit)), expected
    )


def test_blocks_of_rows_join_without_a_seam(tmp_path, monkeypatch):
    made = arrays(103)
    path = write(tmp_path / "a.hdf5", made)
    for rows in (1, 2, 51, 102, 103, 104):
        monkeypatch.setattr(datasets, "ROWS", rows)
        assert_same(datasets.read_hdf5(path, TASK), read_slowly(made, 7))


def test_float64_columns_and_byte_flags_in_a_compressed_file_read_the_same(tmp_path):
    made = arrays()
    stored = {
        key: value.astype("f8" if value.dtype == np.float32 else "u1")
        for key, value in made.items()
    }
    stored = {key: value[:, None] if value.ndim == 1 else value for key, value in stored.items()}
    read = datasets.read_hdf5(write(tmp_path / "a.hdf5", stored, compression="gzip"), TASK)
    assert_same(read, read_slowly(made, 7))


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_blocks_of_rows_and_chunks_of_the_file_need_not_agree(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(datasets, "ROWS", 16)
    made = arrays(200)
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in made.items():
            chunks = (chunk, 1)[: value.ndim]
            file.create_dataset(key, data=value, chunks=chunks, compression="gzip")
    assert_same(datasets.read_hdf5(path, TASK), read_slowly(made, 7))


def test_no_chunk_of_the_file_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ROWS", 50)
    path = tmp_path / "a.hdf5"
    made = arrays(100)
    with h5py.File(path, "w") as file:
        for key, value in made.items():
            file.create_dataset(key, data=value, chunks=(30, *value.shape[1:]))
    starts = []

    def check(rows, where, first):
        starts.append((first, len(rows)))
        return rows

    with h5py.File(path) as file:
        (taken,) = datasets._taken(file["observations"], path, np.ones(100, bool), check=check)
    assert starts == [(0, 30), (30, 30), (60, 30), (90, 10)]
    np.testing.assert_array_equal(taken, made["observations"])


def test_memory_beyond_the_result_is_that_of_a_few_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "ROWS", 4096)
    n = 32 * datasets.ROWS
    path = write(
        tmp_path / "a.hdf5",
        {
            "observations": np.zeros((n, 29), np.float32),
            "actions": np.zeros((n, 8), np.float32),
            "rewards": np.zeros(n, np.float32),
            "terminals": np.zeros(n, bool),
            "timeouts": np.zeros(n, bool),
        },
    )
    tracemalloc.start()
    read = datasets.read_hdf5(path, TASK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = sum(value.nbytes for value in read.values())
    assert peak - result < 6 * datasets.ROWS * 29 * 4
    assert peak < 2 * path.stat().st_size


def test_statistics_are_those_of_the_transitions(tmp_path):
    data = datasets.load(TASK, write(tmp_path / "a.hdf5", arrays()), log=quiet)
    assert datasets.statistics(data) == {
        "n": len(data.rewards),
        "terminal_share": data.terminals.sum() / len(data),
        "reward_min": data.rewards.min(),
        "reward_mean": pytest.approx(data.rewards.mean(), abs=1e-6),
        "reward_max": data.rewards.max(),
    }


# ---------------------------------------------------------------------------------------------------------
# The files of D4RL's families


def antmaze_extras(n):
    return {
        "infos/goal": np.ones((n, 2), "f4"),
        "infos/qpos": np.ones((n, 15), "f4"),
        "infos/qvel": np.ones((n, 14), "f4"),
    }


def locomotion_extras(n):
    """What else a gym_mujoco_v2 file holds. Its next_observations are not the next rows: they must not be read."""
    return {
        "next_observations": np.full((n, 3), np.nan),
        "infos/action_log_probs": np.ones(n, "f4"),
        "metadata/algorithm": np.bytes_("SAC"),
        "metadata/iteration": np.int32(3),
        "metadata/policy/fc0/weight": np.ones((2, 2), "f4"),
    }


def pen_extras(n):
    return {"infos/desired_orien": np.ones((n, 4), "f4"), "metadata/algorithm": np.bytes_("DAPG")}


def kitchen_extras(n):
    return {"infos": np.arange(n)}  # of which demonstration: an array, where others have a group


EXTRAS = {
    "antmaze": antmaze_extras,
    "locomotion": locomotion_extras,
    "adroit": pen_extras,
    "kitchen": kitchen_extras,
}
BASE_NAMES = {
    "antmaze-umaze-diverse-v0": "Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse.hdf5",
    "halfcheetah-medium-replay-v2": "halfcheetah_medium_replay-v2.hdf5",
    "hopper-medium-v2": "hopper_medium-v2.hdf5",
    "walker2d-medium-expert-v2": "walker2d_medium_expert-v2.hdf5",
    "pen-human-v1": "pen-human-v1.hdf5",
    "kitchen-complete-v0": "mini_kitchen_microwave_kettle_light_slider-v0.hdf5",
    "kitchen-mixed-v0": "kitchen_microwave_kettle_bottomburner_light-v0.hdf5",
}


@pytest.mark.parametrize("name, file", BASE_NAMES.items(), ids=BASE_NAMES)
def test_each_familys_file_is_found_by_its_base_name_and_read(tmp_path, monkeypatch, name, file):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    task = tasks.get(name)
    n = 2 * task.episode_limit + 5
    made = arrays(
        n, timeouts=task.family != "kitchen", state_dim=task.state_dim, action_dim=task.action_dim
    )
    made["terminals"][:] = False  # so that kitchen's limit is met
    stored = made | EXTRAS[task.family](n)
    if task.family == "kitchen":
        stored["terminals"] = made["terminals"].astype("f4")
    write(tmp_path / file, stored)
    data = datasets.load(task, "d4rl", log=quiet)
    assert data.label == f"D4RL {name}"
    for key, value in read_slowly(made, task.episode_limit).items():
        np.testing.assert_array_equal(getattr(data, key), value, err_msg=key)


@pytest.mark.parametrize("name", tasks.names())
def test_a_file_of_another_size_is_named_as_the_family_that_it_fits(tmp_path, name):
    task, other = (
        tasks.get(name),
        tasks.get("pen-human-v1" if name.startswith("kitchen") else "kitchen-mixed-v0"),
    )
    path = write(
        tmp_path / "other.hdf5", arrays(state_dim=other.state_dim, action_dim=other.action_dim)
    )
    assert f"probably of {other.name.split('-')[0]}:" in error_of(
        datasets.load, task, path, log=quiet
    )
    assert name.split("-")[0] in datasets.FAMILIES[task.state_dim, task.action_dim]


def test_a_file_of_another_task_of_the_same_size_is_known_by_d4rls_name_and_by_what_made_it(
    tmp_path,
):
    cheetah, walker = tasks.get("halfcheetah-medium-v2"), tasks.get("walker2d-medium-v2")
    made = arrays(state_dim=17, action_dim=6)
    named = write(tmp_path / "walker2d_medium-v2.hdf5", made)
    assert "D4RL's file of walker2d-medium-v2, not of halfcheetah-medium-v2" in error_of(
        datasets.load, cheetah, named, log=quiet
    )
    assert len(datasets.load(walker, named, log=quiet))
    generated = write(tmp_path / "mine.hdf5", made)
    assert len(datasets.load(cheetah, generated, log=quiet))  # nothing says whose it is
    with h5py.File(generated, "r+") as file:
        file.attrs["task"] = "walker2d-medium-v2"
    assert "generated for walker2d-medium-v2" in error_of(
        datasets.load, cheetah, generated, log=quiet
    )


# ---------------------------------------------------------------------------------------------------------
# The repaired reading of antmaze files

STEP = 0.25  # metres an ant walks here in a step


def path(start, direction, n):
    """n places (n, 2) from start on, STEP apart."""
    return np.add(start, STEP * np.arange(n)[:, None] * np.array(direction))


def within(xy, goal):
    return np.hypot(*(xy - np.array(goal)).T) <= 0.5


class Walks:
    """Trajectories [(places (T, 2), goal), ...] end to end, as a file's arrays, and what is true of them.

    follows, reached: (N,), whether a row is a trajectory's last one or not, and whether it ends within 0.5 m of its goal.
    """

    def __init__(self, trajectories):
        places, goals = zip(*trajectories)
        n = sum(map(len, places))
        self.made = arrays(n)
        self.made["observations"][:, :2] = np.concatenate(places)
        self.made["infos/goal"] = np.concatenate(
            [np.tile(goal, (len(xy), 1)) for xy, goal in trajectories]
        ).astype(np.float32)
        self.follows = np.concatenate([np.arange(len(xy)) < len(xy) - 1 for xy in places])
        self.reached = np.concatenate(
            [np.append(within(xy[1:], goal), False) for xy, goal in trajectories]
        )
        self.ends = np.flatnonzero(~self.follows)
        self.mark(self.reached)
        self.made["timeouts"] = ~self.follows

    def mark(self, rows):
        self.made["terminals"], self.made["rewards"] = rows.copy(), rows.astype(np.float32)

    def expected(self, keep, terminals=None):
        """The transitions of the rows keep (N,); terminals (N,), which are the rewards too, if they are not the file's."""
        rows = np.flatnonzero(keep)
        made = self.made
        return {
            "observations": made["observations"][rows],
            "actions": made["actions"][rows],
            "next_observations": made["observations"][rows + 1],
            "rewards": made["rewards"][rows]
            if terminals is None
            else terminals[rows].astype(np.float32),
            "terminals": made["terminals"][rows] if terminals is None else terminals[rows],
        }

    def read(self, tmp_path, repair=True, log=quiet):
        return datasets.read_hdf5(
            write(tmp_path / "walks.hdf5", self.made), TASK, repair=repair, log=log
        )


def jumps(read):
    return np.hypot(*(read["next_observations"] - read["observations"])[:, :2].T)


def four_walks(lengths=(30, 26, 33, 21), goals=((4, 0), (0, 4), (4, 9), (9, 3))):
    """Through a goal and on, up to a goal, away from one, and beside one."""
    starts, directions = ((0, 0), (0, 0), (4, 8), (6, 0)), ((1, 0), (0, 1), (0, -1), (0, 1))
    return [(path(s, d, n), g) for s, d, n, g in zip(starts, directions, lengths, goals)]


def test_rows_that_nothing_follows_go_and_rows_cut_in_the_middle_stay_as_in_medium_diverse(
    tmp_path,
):
    walks, target = (
        Walks(four_walks()),
        np.array([6.2, 3.0]),
    )  # the rewarded goal, which infos/goal does not hold
    xy = walks.made["observations"][:, :2]
    walks.mark(
        np.append(within(xy[1:], target), False)
    )  # D4RL's script takes the next row, whosever it is
    walks.made["timeouts"] = np.arange(len(xy)) % 29 == 28  # out of step with the ends
    default, repaired = walks.read(tmp_path, repair=False), walks.read(tmp_path)
    assert jumps(default).max() > 5 and jumps(repaired).max() < 1
    assert_same(repaired, walks.expected(walks.follows))
    assert repaired["terminals"].sum() >= 3


def test_the_first_rows_after_a_start_near_the_rewarded_goal_do_not_mark_the_row_before(tmp_path):
    walks = Walks(four_walks())
    last = walks.ends[0]
    walks.mark(
        np.append(
            within(walks.made["observations"][1:, :2], walks.made["observations"][last + 1, :2]),
            False,
        )
    )
    assert walks.made["terminals"][last]
    assert_same(walks.read(tmp_path), walks.expected(walks.follows))


def test_every_row_that_ends_at_its_goal_is_terminal_where_the_file_has_one_a_walk_as_in_umaze_diverse(
    tmp_path,
):
    walks = Walks(four_walks())
    first = np.flatnonzero(
        np.diff(walks.reached.astype(int), prepend=0) == 1
    )  # the first of each walk
    walks.mark(np.isin(np.arange(len(walks.reached)), first))
    walks.made["timeouts"] = np.arange(len(walks.reached)) % 29 == 28
    said = []
    repaired = walks.read(tmp_path, log=said.append)
    assert_same(repaired, walks.expected(walks.follows, walks.reached))
    assert walks.reached.sum() > 3 * len(first)
    (line,) = said
    assert f"{walks.reached.sum()} terminals by infos/goal, where the file has {len(first)}" in line
    assert (
        f"{np.sum(walks.follows[:-1] & walks.made['timeouts'][:-1])} rows taken in spite of their timeouts"
        in line
    )
    assert f"{np.sum(~walks.follows[:-1] & ~walks.made['timeouts'][:-1])} more left out" in line


def test_a_walk_that_ends_at_its_goal_keeps_its_last_row_if_the_ant_is_there(tmp_path):
    walks = Walks(
        [
            (path((0, 0), (1, 0), 16), (4, 0)),
            (path((0, 0), (0, 1), 9), (0, 4)),
            (path((5, 5), (1, 0), 9), (9, 5)),
        ]
    )
    walks.mark(walks.reached)
    walks.made["terminals"][walks.ends[:2]] = (
        True  # the first is 0.25 m from its goal, the second 2 m: it did not get there
    )
    kept = walks.follows | (np.arange(34) == walks.ends[0])
    read = walks.read(tmp_path)
    assert_same(read, walks.expected(kept, walks.reached | (np.arange(34) == walks.ends[0])))


def test_another_goal_is_another_walk_however_near_it_starts(tmp_path):
    walks = Walks([(path((0, 0), (1, 0), 12), (2, 0)), (path((3, 0), (1, 0), 12), (4, 0))])
    assert np.abs(np.diff(walks.made["observations"][:, 0])).max() < 1
    walks.made["timeouts"][:] = False
    assert_same(walks.read(tmp_path), walks.expected(walks.follows[:-1]))


def test_a_jump_is_another_walk_though_the_goal_is_the_same(tmp_path):
    walks = Walks(four_walks(goals=[(4, 0)] * 4))
    walks.made["timeouts"][:] = False
    assert jumps(walks.read(tmp_path, repair=False)).max() > 5
    assert_same(walks.read(tmp_path), walks.expected(walks.follows))


def test_a_file_without_terminals_is_given_none(tmp_path):
    walks = Walks(four_walks())
    assert walks.reached.any()
    walks.mark(np.zeros(len(walks.reached), bool))
    assert_same(walks.read(tmp_path), walks.expected(walks.follows))


def test_a_file_without_defects_is_read_as_by_its_flags(tmp_path):
    walks = Walks(four_walks())
    plain, repaired = walks.read(tmp_path, repair=False), walks.read(tmp_path)
    assert len(plain["rewards"]) == len(walks.follows) - 4
    assert_same(repaired, plain)


def test_an_ant_that_walks_as_the_simulated_one_does_is_not_cut(tmp_path):
    task = tasks.get("antmaze-umaze-v0")
    rng = np.random.default_rng(0)
    with task.world(4) as world:
        world.reset(np.arange(4), rng)
        seen = [world.observations.astype(np.float32)]
        for t in range(100):
            actions = rng.choice([-1.0, 1.0], (4, 8)) if t % 10 == 0 else actions
            world.step(np.arange(4), actions, rng)
            seen.append(world.observations.astype(np.float32))
    made = arrays(4 * 101)
    made["observations"] = np.stack(seen, axis=1).reshape(-1, 29)
    made["infos/goal"] = np.repeat(np.arange(4), 101)[:, None].astype(np.float32) * np.ones(
        (1, 2), np.float32
    )
    made["terminals"][:] = False
    read = datasets.read_hdf5(write(tmp_path / "a.hdf5", made), task, repair=True, log=quiet)
    assert len(read["rewards"]) == 4 * 100


UNREPAIRABLE = {
    "no goals": lambda made: made.pop("infos/goal"),
    "infos is an array": lambda made: made.update({"infos": made.pop("infos/goal")}),
    "goals of another size": lambda made: made.update({"infos/goal": made["infos/goal"][:, :1]}),
}


@pytest.mark.parametrize("edit", UNREPAIRABLE.values(), ids=UNREPAIRABLE)
def test_without_goals_there_is_no_repair(tmp_path, edit):
    walks = Walks(four_walks())
    edit(walks.made)
    assert "has no infos/goal" in error_of(walks.read, tmp_path)
    walks.read(tmp_path, repair=False)


def test_a_repair_that_would_lose_every_terminal_is_refused(tmp_path):
    walks = Walks(four_walks(goals=((20, 0), (20, 1), (20, 2), (20, 3))))
    walks.mark(~walks.follows)
    assert "cannot be repaired" in error_of(walks.read, tmp_path)


# ---------------------------------------------------------------------------------------------------------
# Bad files


def change(key, value):
    def edit(made):
        made[key][value[0]] = value[1]

    return edit


def replace(key, value):
    return lambda made: made.update({key: value})


def drop(*keys):
    return lambda made: [made.pop(key) for key in keys]


def shorten(key):
    return lambda made: made.update({key: made[key][:-1]})


def shape(observations, actions):
    return lambda made: made.update(arrays(state_dim=observations, action_dim=actions))


def keep_rows(n):
    return lambda made: made.update({key: value[:n] for key, value in made.items()})


BAD_FILES = {
    "keys missing": (
        drop("actions", "terminals"),
        ["lacks actions, terminals", "observations, rewards"],
    ),
    "halfcheetah": (
        shape(17, 6),
        ["(50, 17)", "(50, 6)", "of halfcheetah or walker2d", "(N, 29)", "(N, 8)"],
    ),
    "unknown shape": (shape(28, 8), ["(50, 28)", "(N, 29)"]),
    "short actions": (shorten("actions"), ["differ in length", "actions 49", "rewards 50"]),
    "short timeouts": (shorten("timeouts"), ["differ in length", "timeouts 49"]),
    "observation nan": (
        change("observations", ((13, 4), np.nan)),
        ["observations", "nan", "row 13"],
    ),
    "last action -inf": (change("actions", ((49, 0), -np.inf)), ["actions", "-inf", "row 49"]),
    "reward inf": (change("rewards", (7, np.inf)), ["rewards", "inf", "row 7"]),
    "action outside": (
        change("actions", ((31, 5), 1.01)),
        ["actions", "1.01", "row 31", "[-1, 1]"],
    ),
    "no rows": (keep_rows(0), ["empty", "0 rows"]),
    "one row": (keep_rows(1), ["empty", "1 rows"]),
    "all cut": (lambda made: made["timeouts"].fill(True), ["no transitions"]),
    "two rewards a row": (replace("rewards", np.zeros((50, 2))), ["rewards", "(50, 2)"]),
    "rewards of text": (replace("rewards", np.full(50, b"one")), ["rewards", "not numbers"]),
    "beyond float32": (replace("rewards", np.full(50, 1e300)), ["rewards", "inf", "row 0"]),
    "terminals nan": (replace("terminals", np.full(50, np.nan)), ["terminals", "nan", "row 0"]),
}


@pytest.mark.parametrize("edit, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_says_what_is_wrong(
    tmp_path, monkeypatch, edit, words
):
    monkeypatch.setattr(datasets, "ROWS", 3)  # so that a row's number is not its place in a block
    made = arrays()
    edit(made)
    message = error_of(datasets.load, TASK, write(tmp_path / "bad.hdf5", made), log=quiet)
    for word in ["bad.hdf5", *words]:
        assert word in message


def test_an_action_a_rounding_error_outside_the_box_is_taken(tmp_path):
    made = arrays()
    made["actions"][3, 5] = 1.0005
    datasets.read_hdf5(write(tmp_path / "a.hdf5", made), TASK)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "no.hdf5" in error_of(datasets.load, TASK, tmp_path / "no.hdf5", log=quiet)
    assert str(tmp_path) in error_of(datasets.load, TASK, str(tmp_path), log=quiet)


def test_text_and_a_truncated_file_are_told_apart_from_a_whole_one(tmp_path):
    (tmp_path / "text.hdf5").write_text("<html>404</html>")
    whole = write(tmp_path / "whole.hdf5", arrays()).read_bytes()
    (tmp_path / "short.hdf5").write_bytes(whole[: len(whole) // 2])
    assert "signature" in error_of(datasets.load, TASK, tmp_path / "text.hdf5", log=quiet)
    assert "truncated" in error_of(datasets.load, TASK, tmp_path / "short.hdf5", log=quiet)


def test_a_damaged_compressed_block_is_an_error_and_not_data(tmp_path):
    path = write(tmp_path / "a.hdf5", arrays(2000), compression="gzip")
    with h5py.File(path) as file:
        chunk = file["observations"].id.get_chunk_info(0)
    damaged = bytearray(path.read_bytes())
    damaged[chunk.byte_offset : chunk.byte_offset + 64] = bytes(64)
    path.write_bytes(damaged)
    assert "damaged" in error_of(datasets.load, TASK, path, log=quiet)


# ---------------------------------------------------------------------------------------------------------
# Where the data come from


class Server:
    """Answers GET from `files` (path -> body); a path in `cut` gets the right size and half of the body."""

    def __init__(self):
        self.files, self.cut, self.unsized, self.asked = {}, set(), set(), []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                body = server.files.get(self.path)
                if body is None:
                    return self.send_error(404)
                self.send_response(200)
                if self.path not in server.unsized:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in server.cut else body)

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty D4RL folder, and no address that answers."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(fetch, "D4RL_URL", f"{closed}/offline_rl/")
    monkeypatch.setattr(fetch, "MIRROR_URL", f"{closed}/mirror/")
    monkeypatch.setattr(fetch, "TIMEOUT", 5)
    return tmp_path / "d4rl"


@pytest.fixture
def server(folder, monkeypatch):
    server = Server()
    monkeypatch.setattr(fetch, "D4RL_URL", f"{server.url}/offline_rl/")
    monkeypatch.setattr(fetch, "MIRROR_URL", f"{server.url}/mirror/")
    yield server
    server.http.shutdown()
    server.http.server_close()


FIRST, SECOND = "/offline_rl/ant_maze_new/Ant_maze.hdf5", "/mirror/Ant_maze.hdf5"


@pytest.fixture
def body(tmp_path):
    return write(tmp_path / "served.hdf5", arrays()).read_bytes()


@pytest.fixture
def generator(tmp_path, monkeypatch):
    """Stands in for tasks/generate.py; the list of its calls."""
    calls = []

    def cached(task, *, n_transitions=1_000_000, seed=0, log=print):
        calls.append((task.name, seed))
        return write(tmp_path / f"made-{seed}.hdf5", arrays(1200, seed))

    monkeypatch.setitem(sys.modules, "tasks.generate", types.SimpleNamespace(cached=cached))
    return calls


def load(source, **kwargs):
    """The data set and all that was logged, as one string."""
    lines = []
    data = datasets.load(TASK, source, log=lines.append, **kwargs)
    assert all("\n" not in line for line in lines)
    return data, " | ".join(lines)


def test_a_path_is_read_and_labelled_with_its_name(tmp_path, folder, generator):
    data, said = load(str(write(tmp_path / "mine.hdf5", arrays())))
    assert (data.source, data.label) == ("file", "file mine.hdf5 (task antmaze-umaze-v0)")
    assert str(tmp_path / "mine.hdf5") in said and str(tmp_path / "mine.hdf5") in data.reason
    assert generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_d4rls_file_on_disk_is_taken_first_and_the_network_is_not_asked(
    folder, server, generator, source
):
    write(folder / "Ant_maze.hdf5", arrays())
    data, said = load(source)
    assert (data.source, data.label) == ("d4rl", "D4RL antmaze-umaze-v0")
    assert str(folder) in data.reason and data.reason in said
    assert server.asked == [] and generator == []


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_missing_d4rl_file_is_downloaded_and_then_found(folder, server, body, generator, source):
    server.files[FIRST] = body
    data, said = load(source)
    assert data.label == "D4RL antmaze-umaze-v0"
    assert server.url + FIRST in data.reason and server.url + FIRST in said
    assert (
        os.listdir(folder) == ["Ant_maze.hdf5"] and (folder / "Ant_maze.hdf5").read_bytes() == body
    )
    assert "found in" in load(source)[0].reason
    assert server.asked == [FIRST] and generator == []


def test_auto_generates_when_no_address_answers_and_says_so(folder, generator):
    data, said = load("auto", seed=3)
    assert data.source == "generated"
    assert data.label == "GENERATED antmaze-umaze-v0 (seed 3, 1,200 transitions; not D4RL's data)"
    for words in (
        f"no D4RL file in {folder}",
        "download failed (connection refused)",
        "generated here",
    ):
        assert words in data.reason
    assert data.reason in said and "NOT D4RL's" in said
    assert generator == [("antmaze-umaze-v0", 3)]


def test_an_unknown_host_is_called_name_resolution(folder, generator, monkeypatch):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "download failed (name resolution)" in load("auto")[0].reason


PEN = Task("pen-human-v1", 45, 24, 100, "hand_dapg_v1/pen-human-v1.hdf5", "adroit", False)


def test_a_task_without_a_generator_says_which_file_goes_where(folder, generator):
    by_hand = (
        f"there are no generated data for pen-human-v1: put D4RL's hand_dapg_v1/pen-human-v1.hdf5 "
        f"({fetch.D4RL_URL}hand_dapg_v1/pen-human-v1.hdf5) into {folder} as pen-human-v1.hdf5, or give --data PATH"
    )
    assert error_of(datasets.load, PEN, "generated", log=quiet) == by_hand
    message = error_of(datasets.load, PEN, "auto", log=quiet)
    assert message == f"no D4RL file in {folder}, download failed (connection refused); {by_hand}"
    message = error_of(datasets.load, PEN, "d4rl", log=quiet)
    assert "--data PATH" in message and "generated" not in message
    assert generator == []


def test_a_file_put_there_by_hand_is_found(folder, generator):
    write(folder / "pen-human-v1.hdf5", arrays(state_dim=45, action_dim=24))
    assert datasets.load(PEN, log=quiet).label == "D4RL pen-human-v1"


def test_repaired_data_are_labelled_so_and_have_another_fingerprint(tmp_path, folder):
    walks = Walks(four_walks())
    walks.made["timeouts"] = np.arange(len(walks.follows)) % 29 == 28
    write(folder / "Ant_maze.hdf5", walks.made)
    write(tmp_path / "mine.hdf5", walks.made)
    repaired, said = load("d4rl", repair=True)
    assert repaired.label == "D4RL antmaze-umaze-v0, repaired" and "data: repaired: " in said
    assert load("auto", repair=True)[0].label == repaired.label
    assert (
        load(tmp_path / "mine.hdf5", repair=True)[0].label
        == "file mine.hdf5 (task antmaze-umaze-v0), repaired"
    )
    plain, said = load("d4rl")
    assert plain.label == "D4RL antmaze-umaze-v0" and "data: repaired" not in said
    assert repaired.fingerprint()["crc32"] != plain.fingerprint()["crc32"]


def test_what_cannot_be_repaired_is_not_called_broken(folder, generator):
    write(folder / "Ant_maze.hdf5", arrays())
    message = error_of(load, "d4rl", repair=True)
    assert "leave out --repair-data" in message and "delete" not in message


def test_nothing_is_known_to_be_broken_in_other_data(tmp_path, folder, server, generator):
    for source in ("auto", "d4rl", tmp_path / "mine.hdf5"):
        message = error_of(datasets.load, PEN, source, repair=True, log=quiet)
        assert (
            "nothing is known to be broken in pen-human-v1 data" in message
            and "--repair-data" in message
        )
    assert "nothing is known to be broken in generated data" in error_of(
        load, "generated", repair=True
    )
    assert server.asked == [] and generator == []


def test_data_to_be_repaired_are_not_replaced_by_generated_ones(folder, generator):
    message = error_of(load, "auto", repair=True)
    assert "download failed (connection refused)" in message and "--repair-data" in message
    assert generator == []


def test_d4rl_refuses_to_substitute_and_names_each_address_and_the_ways_on(
    folder, server, generator
):
    server.files[SECOND] = b"<html>moved</html>"
    message = error_of(load, "d4rl")
    assert f"{server.url}{FIRST}: HTTP 404" in message
    assert f"{server.url}{SECOND}: what came is not a whole HDF5 file" in message
    assert "--data PATH" in message and "--data generated" in message
    assert generator == [] and os.listdir(folder) == []


def test_generated_asks_neither_disk_nor_network(folder, server, generator):
    write(folder / "Ant_maze.hdf5", arrays())
    data, said = load("generated")
    assert data.source == "generated" and "NOT D4RL's" in said
    assert server.asked == [] and generator == [("antmaze-umaze-v0", 0)]


@pytest.mark.parametrize("source", ["auto", "d4rl"])
def test_a_broken_d4rl_file_is_reported_and_left_alone(folder, server, body, generator, source):
    server.files[FIRST] = body
    folder.mkdir()
    (folder / "Ant_maze.hdf5").write_bytes(body[:1000])
    message = error_of(load, source)
    assert str(folder / "Ant_maze.hdf5") in message and "delete it" in message
    assert (folder / "Ant_maze.hdf5").read_bytes() == body[:1000]
    assert server.asked == [] and generator == []


def test_a_broken_generated_file_is_reported_with_its_path(folder, tmp_path, monkeypatch):
    broken = tmp_path / "made.hdf5"
    broken.write_bytes(b"half")
    fake = types.SimpleNamespace(cached=lambda task, **kwargs: broken)
    monkeypatch.setitem(sys.modules, "tasks.generate", fake)
    message = error_of(load, "generated")
    assert str(broken) in message and "delete it" in message


def test_the_d4rl_folder_is_d4rls_own(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    assert fetch.d4rl_folder() == tmp_path / ".d4rl/datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "elsewhere"))
    assert fetch.d4rl_folder() == tmp_path / "elsewhere"


# ---------------------------------------------------------------------------------------------------------
# Downloads that go wrong


def test_a_body_cut_short_is_discarded_and_the_mirror_is_asked(folder, server, body):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST}
    assert fetch.fetch(TASK) == server.url + SECOND
    assert server.asked == [FIRST, SECOND]
    assert (folder / "Ant_maze.hdf5").read_bytes() == body and os.listdir(folder) == [
        "Ant_maze.hdf5"
    ]


@pytest.mark.parametrize("sized", [True, False])
def test_bodies_cut_short_everywhere_leave_nothing(folder, server, body, sized):
    server.files = {FIRST: body, SECOND: body}
    server.cut = {FIRST, SECOND}
    server.unsized = set() if sized else {FIRST, SECOND}
    message = error_of(fetch.fetch, TASK)
    assert (
        f"connection lost after {len(body) // 2:,}" if sized else "not a whole HDF5 file"
    ) in message
    assert os.listdir(folder) == []


def test_an_interrupt_leaves_nothing_and_goes_through(folder, server, body, generator, monkeypatch):
    seen = []

    def interrupted(response, total):
        yield body[:100]
        seen.extend(os.listdir(folder))
        raise KeyboardInterrupt

    server.files[FIRST] = body
    monkeypatch.setattr(fetch, "_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load("auto")
    assert seen == [f"Ant_maze.hdf5.part-{os.getpid()}"]
    assert os.listdir(folder) == [] and generator == []


def test_a_folder_that_cannot_be_written_is_named_before_the_network_is_asked(
    folder, server, generator
):
    folder.write_text("a file stands here")
    message = error_of(load, "d4rl")
    assert str(folder) in message and "D4RL_DATASET_DIR" in message
    assert server.asked == []
    assert "folder not writable" in load("auto")[0].reason


@pytest.mark.skipif(
    not Path("/sys").is_dir(), reason="needs a folder that root cannot write to either"
)
def test_a_read_only_folder_is_reported_before_the_network_is_asked(server, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", "/sys")
    assert "cannot write to /sys" in error_of(fetch.fetch, TASK)
    assert server.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_in_auto_too_and_leaves_nothing(folder, server, body, generator):
    server.files[FIRST] = body
    folder.mkdir()
    (folder / f"Ant_maze.hdf5.part-{os.getpid()}").symlink_to("/dev/full")
    message = error_of(load, "auto")
    assert os.strerror(errno.ENOSPC) in message and str(folder) in message
    assert os.listdir(folder) == [] and generator == [] and server.asked == [FIRST]

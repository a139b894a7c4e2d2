"""tasks/hdf5.py: files are read by D4RL's rules, and bad files are refused in one line."""

import dataclasses
import tracemalloc

import h5py
import numpy as np
import pytest
from dataset_files import TASK, arrays, assert_same, error_of, quiet, read_slowly, write

import tasks
from tasks import datasets, hdf5

# ---- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 8, 50, 301])
@pytest.mark.parametrize("seed", range(4))
def test_timeouts_are_cut_as_a_slow_loop_cuts_them(tmp_path, n, seed):
    made = arrays(n, seed)
    made["timeouts"][0] = False
    assert_same(hdf5.read_hdf5(write(tmp_path / "a.hdf5", made), TASK), read_slowly(made, 7))


@pytest.mark.parametrize("limit", [2, 3, 7, 1000])
@pytest.mark.parametrize("terminal_rate", [0, 0.02, 0.3, 0.9])
def test_without_timeouts_the_episode_limit_cuts(tmp_path, limit, terminal_rate):
    """As the slow loop does."""
    made = arrays(400, timeouts=False)
    made["terminals"] = np.random.default_rng(limit).random(400) < terminal_rate
    task = dataclasses.replace(TASK, episode_limit=limit)
    read = hdf5.read_hdf5(write(tmp_path / "a.hdf5", made), task)
    assert_same(read, read_slowly(made, limit))


def test_blocks_of_rows_join_without_a_seam(tmp_path, monkeypatch):
    made = arrays(103)
    path = write(tmp_path / "a.hdf5", made)
    for rows in (1, 2, 51, 102, 103, 104):
        monkeypatch.setattr(hdf5, "ROWS", rows)
        assert_same(hdf5.read_hdf5(path, TASK), read_slowly(made, 7))


def test_other_number_types_and_gzip_read_the_same(tmp_path):
    """float64 columns, byte flags, and rewards and flags as (N, 1)."""
    made, stored = arrays(), {}
    for key, value in made.items():
        value = value.astype("f8" if value.dtype == np.float32 else "u1")
        stored[key] = value[:, None] if value.ndim == 1 else value
    path = write(tmp_path / "a.hdf5", stored, compression="gzip")
    assert_same(hdf5.read_hdf5(path, TASK), read_slowly(made, 7))


@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_blocks_of_rows_and_chunks_of_the_file_may_differ(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(hdf5, "ROWS", 16)
    made = arrays(200)
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in made.items():
            chunks = (chunk, 1)[: value.ndim]
            file.create_dataset(key, data=value, chunks=chunks, compression="gzip")
    assert_same(hdf5.read_hdf5(path, TASK), read_slowly(made, 7))


def test_no_chunk_of_the_file_is_read_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "ROWS", 50)
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
        (taken,) = hdf5._taken(file["observations"], path, np.ones(100, bool), check=check)
    assert starts == [(0, 30), (30, 30), (60, 30), (90, 10)]
    np.testing.assert_array_equal(taken, made["observations"])


def test_reading_needs_the_result_and_a_few_blocks_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5, "ROWS", 4096)
    n = 32 * hdf5.ROWS
    made = {
        "observations": np.zeros((n, 29), np.float32),
        "actions": np.zeros((n, 8), np.float32),
        "rewards": np.zeros(n, np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    path = write(tmp_path / "a.hdf5", made)
    tracemalloc.start()
    read = hdf5.read_hdf5(path, TASK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = sum(value.nbytes for value in read.values())
    assert peak - result < 6 * hdf5.ROWS * 29 * 4
    assert peak < 2 * path.stat().st_size


# ---- What is said about it -----------------------------------------------------------------------


def said(tmp_path, made, task=TASK, **how) -> list[str]:
    lines = []
    hdf5.read_hdf5(write(tmp_path / "a.hdf5", made), task, log=lines.append, **how)
    return lines


@pytest.mark.parametrize("name", ["hopper-medium-v2", "antmaze-umaze-v0"])
def test_a_line_sums_up_what_was_read(tmp_path, name):
    """Terminals end an episode, except in antmazes, where the ant goes on."""
    task = tasks.get(name)
    made = arrays(3500, state_dim=task.state_dim, action_dim=task.action_dim)
    made["rewards"][:] = 1
    for key, rows in (("terminals", [999]), ("timeouts", [1999, 2499, 3499])):
        made[key] = np.isin(np.arange(3500), rows)
    made["observations"][[3, 4, 1700]] = 0
    made["observations"][1000:1500, 0] = 0
    (line,) = said(tmp_path, made, task)
    count, mean, best = (
        (4, "875", "1,000") if task.family == "locomotion" else (3, "1,167", "2,000")
    )
    assert line == (
        f"data: 3,497 transitions of 3,500 rows, {count} episodes of mean return {mean} "
        f"and best {best}, 1 terminals, 3 observations of zeros only"
    )


def test_terminals_lost_to_timeouts_are_reported_with_rewards(tmp_path):
    """As in a file whose timeouts mark every end."""
    hopper = tasks.get("hopper-medium-v2")
    made = arrays(40, state_dim=11, action_dim=3)
    ends = np.arange(40) % 10 == 9
    made["terminals"], made["timeouts"] = ends & (np.arange(40) != 19), ends
    made["rewards"] = np.where(made["terminals"], 100, 1).astype(np.float32)
    (line,) = said(tmp_path, made, hopper)  # of D4RL's files and generated ones that is known
    lost, again = said(tmp_path, made, hopper, own=True)
    assert again == line
    assert "leaves out rows that timed out, and with them 3 of 3 terminals" in lost
    assert "300 of 337 reward; clear timeouts on rows where" in lost
    assert "36 transitions of 40 rows, 4 episodes" in line and "0 terminals" in line
    made["timeouts"] = ends & ~made["terminals"]
    (line,) = said(tmp_path, made, hopper, own=True)
    # All but the last row's, which has no next one.
    assert "38 transitions of 40 rows, 4 episodes" in line and "2 terminals" in line


# ---- The files of D4RL's families ----------------------------------------------------------------


def antmaze_extras(n):
    return {
        "infos/goal": np.ones((n, 2), "f4"),
        "infos/qpos": np.ones((n, 15), "f4"),
        "infos/qvel": np.ones((n, 14), "f4"),
    }


def locomotion_extras(n):
    """What else a gym_mujoco_v2 file holds.

    Its next_observations are not the next rows: they must not be read.
    """
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
    # infos says which demonstration: an array, where others have a group.
    return {"infos": np.arange(n), "terminals": np.zeros(n, "f4")}


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
def test_a_file_is_found_by_its_base_name_and_read(tmp_path, monkeypatch, name, file):
    """One of each family, with all that D4RL's files hold."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    task = tasks.get(name)
    n, timeouts = 2 * task.episode_limit + 5, task.family != "kitchen"
    made = arrays(n, 0, timeouts, task.state_dim, task.action_dim)
    made["terminals"][:] = False  # so that kitchen's limit is met
    write(tmp_path / file, made | EXTRAS[task.family](n))
    data = datasets.load(task, "d4rl", log=quiet)
    assert data.label == f"D4RL {name}"
    for key, value in read_slowly(made, task.episode_limit).items():
        np.testing.assert_array_equal(getattr(data, key), value, err_msg=key)


@pytest.mark.parametrize("name", tasks.names())
def test_a_file_of_another_size_is_named_as_its_family(tmp_path, name):
    task = tasks.get(name)
    other = tasks.get("pen-human-v1" if task.family == "kitchen" else "kitchen-mixed-v0")
    made = arrays(state_dim=other.state_dim, action_dim=other.action_dim)
    message = error_of(datasets.load, task, write(tmp_path / "other.hdf5", made), log=quiet)
    assert f"probably of {other.name.split('-')[0]}:" in message
    assert name.split("-")[0] in hdf5.FAMILIES[task.state_dim, task.action_dim]


def test_a_file_of_another_task_of_the_same_size_is_refused(tmp_path):
    """By D4RL's name of the file, or by what a generated file says of itself."""
    cheetah, walker = tasks.get("halfcheetah-medium-v2"), tasks.get("walker2d-medium-v2")
    made = arrays(state_dim=17, action_dim=6)
    named = write(tmp_path / "walker2d_medium-v2.hdf5", made)
    message = error_of(datasets.load, cheetah, named, log=quiet)
    assert "D4RL's file of walker2d-medium-v2, not of halfcheetah-medium-v2" in message
    assert len(datasets.load(walker, named, log=quiet))
    generated = write(tmp_path / "mine.hdf5", made)
    assert len(datasets.load(cheetah, generated, log=quiet))  # nothing says whose it is
    with h5py.File(generated, "r+") as file:
        file.attrs["task"] = "walker2d-medium-v2"
    assert len(datasets.load(cheetah, generated, log=quiet))  # an attribute of the user's own
    with h5py.File(generated, "r+") as file:
        file.attrs["recipe_version"] = 3
    message = error_of(datasets.load, cheetah, generated, log=quiet)
    assert "generated for walker2d-medium-v2" in message


# ---- Bad files -----------------------------------------------------------------------------------


def change(key, where, value):
    def edit(made):
        made[key][where] = value

    return edit


def replace(key, value):
    return lambda made: made.update({key: value})


def drop(*keys):
    return lambda made: [made.pop(key) for key in keys]


def shorten(key):
    return lambda made: made.update({key: made[key][:-1]})


def shape(observations, actions):
    return lambda made: made.update(arrays(state_dim=observations, action_dim=actions))


def first_rows(n):
    return lambda made: made.update({key: value[:n] for key, value in made.items()})


# What is wrong with the file, and what the message must say.
BAD_FILES = {
    "keys missing": (
        drop("actions", "terminals"),
        "lacks actions, terminals|observations, rewards",
    ),
    "halfcheetah": (shape(17, 6), "(50, 17)|(50, 6)|of halfcheetah or walker2d|(N, 29)|(N, 8)"),
    "unknown shape": (shape(28, 8), "(50, 28)|(N, 29)"),
    "short actions": (shorten("actions"), "differ in length|actions 49|rewards 50"),
    "short timeouts": (shorten("timeouts"), "differ in length|timeouts 49"),
    "observation nan": (change("observations", (13, 4), np.nan), "observations|nan|row 13"),
    "last action -inf": (change("actions", (49, 0), -np.inf), "actions|-inf|row 49"),
    "reward inf": (change("rewards", 7, np.inf), "rewards|inf|row 7"),
    "action outside": (change("actions", (31, 5), 1.01), "actions|1.01|row 31|[-1, 1]"),
    "no rows": (first_rows(0), "empty|0 rows"),
    "one row": (first_rows(1), "empty|1 rows"),
    "all cut": (lambda made: made["timeouts"].fill(True), "no transitions"),
    "two rewards a row": (replace("rewards", np.zeros((50, 2))), "rewards|(50, 2)"),
    "rewards of text": (replace("rewards", np.full(50, b"one")), "rewards|not numbers"),
    "beyond float32": (replace("rewards", np.full(50, 1e300)), "rewards|inf|row 0"),
    "terminals nan": (replace("terminals", np.full(50, np.nan)), "terminals|nan|row 0"),
}


@pytest.mark.parametrize("edit, words", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_a_line_that_says_why(tmp_path, monkeypatch, edit, words):
    monkeypatch.setattr(hdf5, "ROWS", 3)  # so that a row's number is not its place in a block
    made = arrays()
    edit(made)
    message = error_of(datasets.load, TASK, write(tmp_path / "bad.hdf5", made), log=quiet)
    for word in ["bad.hdf5", *words.split("|")]:
        assert word in message


def test_an_action_outside_the_box_by_rounding_is_taken(tmp_path):
    made = arrays()
    made["actions"][3, 5] = 1.0005
    hdf5.read_hdf5(write(tmp_path / "a.hdf5", made), TASK)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    assert "no.hdf5" in error_of(datasets.load, TASK, tmp_path / "no.hdf5", log=quiet)
    assert str(tmp_path) in error_of(datasets.load, TASK, str(tmp_path), log=quiet)


def test_text_and_a_truncated_file_are_refused(tmp_path):
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

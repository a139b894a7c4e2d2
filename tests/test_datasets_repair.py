"""tasks/repair.py: antmaze files without the known defects of D4RL's."""

import numpy as np
import pytest
from dataset_files import (
    TASK,
    Walks,
    arrays,
    assert_same,
    error_of,
    four_walks,
    path,
    quiet,
    within,
    write,
)

import tasks
from tasks import datasets, hdf5


def jumps(read):
    """How far each transition moves (n,), metres."""
    return np.hypot(*(read["next_observations"] - read["observations"])[:, :2].T)


def test_a_row_goes_if_and_only_if_nothing_follows_it(tmp_path):
    """As in medium-diverse: timeouts cut in the middle, and not at the ends of trajectories."""
    walks = Walks(four_walks())
    xy = walks.made["observations"][:, :2]
    rewarded_goal = np.array([6.2, 3.0])  # infos/goal does not hold it
    # D4RL's script looks at the next row, whosever it is.
    walks.mark(np.append(within(xy[1:], rewarded_goal), False))
    walks.made["timeouts"] = np.arange(len(xy)) % 29 == 28  # out of step with the ends
    default, repaired = walks.read(tmp_path, repair=False), walks.read(tmp_path)
    assert jumps(default).max() > 5 and jumps(repaired).max() < 1
    assert_same(repaired, walks.expected(walks.follows))
    assert repaired["terminals"].sum() >= 3


def test_a_start_at_the_rewarded_goal_marks_no_row_before_it(tmp_path):
    walks = Walks(four_walks())
    last, xy = walks.ends[0], walks.made["observations"][:, :2]
    walks.mark(np.append(within(xy[1:], xy[last + 1]), False))
    assert walks.made["terminals"][last]
    assert_same(walks.read(tmp_path), walks.expected(walks.follows))


def test_every_row_that_ends_at_its_goal_is_terminal(tmp_path):
    """Where the file marks only the first of each trajectory, as in umaze-diverse."""
    walks = Walks(four_walks())
    n = len(walks.reached)
    first = np.flatnonzero(np.diff(walks.reached.astype(int), prepend=0) == 1)
    walks.mark(np.isin(np.arange(n), first))
    walks.made["timeouts"] = np.arange(n) % 29 == 28
    said = []
    repaired = walks.read(tmp_path, log=said.append)
    assert_same(repaired, walks.expected(walks.follows, walks.reached))
    assert walks.reached.sum() > 3 * len(first)
    line, summary = said
    follows, cut = walks.follows[:-1], walks.made["timeouts"][:-1]
    assert f"{walks.reached.sum()} terminals by infos/goal, where the file has {len(first)}" in line
    assert f"{np.sum(follows & cut)} rows taken in spite of their timeouts" in line
    assert f"{np.sum(~follows & ~cut)} more left out" in line
    assert f"of {n} rows, 4 episodes of mean return {walks.reached.sum() / 4:.4g} " in summary


def test_a_last_row_at_its_goal_stays_if_the_ant_is_there(tmp_path):
    walks = Walks(
        [
            (path((0, 0), (1, 0), 16), (4, 0)),
            (path((0, 0), (0, 1), 9), (0, 4)),
            (path((5, 5), (1, 0), 9), (9, 5)),
        ]
    )
    walks.mark(walks.reached)
    # The first ends 0.25 m from its goal, the second 2 m: it did not get there.
    walks.made["terminals"][walks.ends[:2]] = True
    stays = np.arange(34) == walks.ends[0]
    expected = walks.expected(walks.follows | stays, walks.reached | stays)
    assert_same(walks.read(tmp_path), expected)


def test_another_goal_begins_another_trajectory(tmp_path):
    """However near it starts."""
    walks = Walks([(path((0, 0), (1, 0), 12), (2, 0)), (path((3, 0), (1, 0), 12), (4, 0))])
    assert np.abs(np.diff(walks.made["observations"][:, 0])).max() < 1
    walks.made["timeouts"][:] = False
    assert_same(walks.read(tmp_path), walks.expected(walks.follows))


def test_a_jump_begins_another_trajectory(tmp_path):
    """Though the goal is the same."""
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


def test_an_ant_that_walks_as_the_simulated_one_is_not_cut(tmp_path):
    n, n_steps = 4, 100
    task = tasks.get("antmaze-umaze-v0")
    rng = np.random.default_rng(0)
    with task.world(n) as world:
        world.reset(np.arange(n), rng)
        seen = [world.observations.astype(np.float32)]
        for t in range(n_steps):
            if t % 10 == 0:
                actions = rng.choice([-1.0, 1.0], (n, 8))
            world.step(np.arange(n), actions, rng)
            seen.append(world.observations.astype(np.float32))
    made = arrays(n * len(seen))
    made["observations"] = np.stack(seen, axis=1).reshape(-1, 29)
    goals = np.repeat(np.arange(n, dtype=np.float32), len(seen))
    made["infos/goal"] = np.stack([goals, goals], axis=1)
    made["terminals"][:] = False
    read = hdf5.read_hdf5(write(tmp_path / "a.hdf5", made), task, repair=True, log=quiet)
    assert len(read["rewards"]) == n * n_steps


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


# ---- Through tasks.load --------------------------------------------------------------------------


def test_repaired_data_have_another_label_and_fingerprint(tmp_path, d4rl_folder):
    walks = Walks(four_walks())
    walks.made["timeouts"] = np.arange(len(walks.follows)) % 29 == 28
    write(d4rl_folder / "Ant_maze.hdf5", walks.made)
    mine = write(tmp_path / "mine.hdf5", walks.made)

    def load(source, **how):
        lines = []
        return datasets.load(TASK, source, log=lines.append, **how), "\n".join(lines)

    repaired, said = load("d4rl", repair=True)
    assert repaired.label == "D4RL antmaze-umaze-v0, repaired" and "data: repaired: " in said
    assert load("auto", repair=True)[0].label == repaired.label
    own, _ = load(mine, repair=True)
    assert own.label == "file mine.hdf5 (task antmaze-umaze-v0), repaired"
    plain, said = load("d4rl")
    assert plain.label == "D4RL antmaze-umaze-v0" and "data: repaired" not in said
    assert repaired.fingerprint()["crc32"] != plain.fingerprint()["crc32"]


def test_what_cannot_be_repaired_is_not_called_broken(d4rl_folder):
    write(d4rl_folder / "Ant_maze.hdf5", arrays())
    message = error_of(datasets.load, TASK, "d4rl", repair=True, log=quiet)
    assert "leave out --repair-data" in message and "delete" not in message


def test_other_data_than_antmazes_have_nothing_to_repair(tmp_path, d4rl_folder):
    pen = tasks.get("pen-human-v1")
    for source in ("auto", "d4rl", tmp_path / "mine.hdf5"):
        message = error_of(datasets.load, pen, source, repair=True, log=quiet)
        assert "nothing is known to be broken in pen-human-v1 data" in message
        assert "--repair-data" in message
    message = error_of(datasets.load, TASK, "generated", repair=True, log=quiet)
    assert "nothing is known to be broken in generated data" in message


def test_data_to_be_repaired_are_not_replaced_by_generated_ones(d4rl_folder):
    message = error_of(datasets.load, TASK, "auto", repair=True, log=quiet)
    assert "download failed (connection refused)" in message and "--repair-data" in message

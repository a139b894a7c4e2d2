"""Generated antmaze data: the planner, the walker, and what the rows mean."""

import dataclasses

import numpy as np
import pytest

import tasks
from tasks.antmaze import GOAL_RADIUS, MAZES, AntBatch, sample_goals
from tasks.antmaze_data import Planner, Recipe, simulate, statistics
from tasks.walker import walk


def small(name="antmaze-umaze-v0", limit=150):
    """A task with short episodes, so that a test sees many ends of trajectories quickly."""
    return dataclasses.replace(tasks.get(name), episode_limit=limit)


@pytest.fixture(scope="module")
def data():
    return simulate(small(limit=350), 20 * 350, seed=1, recipe=Recipe())


@pytest.mark.parametrize("maze", MAZES)
def test_next_cells_lead_to_every_target_through_free_cells(maze):
    planner = Planner(maze)
    for target in planner.free:
        for cell in planner.free:
            steps = 0
            while cell != target:
                following = planner.next_cell[target, cell]
                places = [np.divmod(c, planner.shape[1]) for c in (cell, following)]
                assert np.abs(np.subtract(*places)).sum() == 1  # a neighbour
                cell, steps = following, steps + 1
                assert cell in planner.free and steps < len(planner.free)


def test_paths_are_shortest():
    planner = Planner("umaze")
    cell, path = planner.number(1, 1), []
    while cell != planner.goal_cell:
        cell = planner.next_cell[planner.goal_cell, cell]
        path.append(tuple(int(i) for i in np.divmod(cell, planner.shape[1])))
    assert path == [(1, 2), (1, 3), (2, 3), (3, 3), (3, 2), (3, 1)]


def test_an_ant_is_in_the_cell_whose_centre_is_nearest():
    planner = Planner("umaze")
    where = planner.cell(np.array([[0.0, 0.0], [1.9, -1.9], [2.1, 0.0], [8.0, 5.9], [-50.0, 50.0]]))
    assert [divmod(int(cell), 5) for cell in where] == [(1, 1), (1, 1), (1, 2), (2, 3), (4, 0)]


def test_the_walker_reaches_most_umaze_goals_without_noise():
    n, rng, planner = 12, np.random.default_rng(0), Planner("umaze")
    goals, reached = sample_goals("umaze", n, rng), np.zeros(n, bool)
    with AntBatch("umaze", n) as ants:
        ants.reset(np.arange(n), rng)
        for _ in range(300):
            xy = ants.qpos[:, :2]
            step = planner.next_cell[planner.goal_cell, planner.cell(xy)]
            at_goal = (step == planner.goal_cell)[:, None]
            heading = np.where(at_goal, goals, planner.centers[step]) - xy
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
            actions = walk(ants.qpos, ants.qvel, heading)
            assert actions.shape == (n, 8) and np.abs(actions).max() <= 1
            ants.step(actions)
            reached |= np.linalg.norm(ants.qpos[:, :2] - goals, axis=1) <= GOAL_RADIUS
    assert reached.mean() >= 0.75


def test_the_walker_does_the_same_in_a_rotated_world():
    rng, n, angle = np.random.default_rng(0), 5, 0.7
    qpos, qvel, direction = (rng.standard_normal((n, width)) for width in (15, 14, 2))
    qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    rotated_qpos, rotated_qvel = qpos.copy(), qvel.copy()
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = qpos[:, 3:7].T
    quaternion = (c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w)
    rotated_qpos[:, 3:7] = np.stack(quaternion, axis=1)
    rotated_qvel[:, :2] = qvel[:, :2] @ rotation
    rotated = walk(rotated_qpos, rotated_qvel, direction @ rotation)
    np.testing.assert_allclose(rotated, walk(qpos, qvel, direction), atol=1e-12)


def test_reward_says_the_next_state_is_at_the_goal(data):
    inside = ~data["timeouts"][:-1]
    distance = np.linalg.norm(data["observations"][1:, :2] - data["infos/goal"][:-1], axis=1)
    paid = data["rewards"][:-1] == 1
    np.testing.assert_array_equal((distance <= GOAL_RADIUS)[inside], paid[inside])
    np.testing.assert_array_equal(data["rewards"], data["terminals"])


def test_trajectories_are_whole_and_no_longer_than_the_limit(data):
    ends = np.flatnonzero(data["timeouts"])
    assert ends[-1] == len(data["timeouts"]) - 1
    assert np.diff(np.concatenate([[-1], ends])).max() <= 350
    inside = ~data["timeouts"][:-1]
    moved = np.linalg.norm(np.diff(data["observations"][:, :2], axis=0), axis=1)
    assert moved[inside].max() < 1.5  # metres in 0.1 s: nobody jumps within a trajectory
    assert (np.diff(data["infos/goal"], axis=0) == 0).all(axis=1)[inside].all()


def test_trajectories_go_on_after_the_goal_and_leave_it(data):
    assert (data["terminals"] & ~data["timeouts"]).any()
    # Few trajectories, so the bounds are wide; hovering ants would make it 0.15.
    assert 0.003 < data["terminals"].mean() < 0.05


def test_umaze_starts_at_the_robots_cell_and_diverse_anywhere(data):
    def starts(arrays):
        rows = np.concatenate([[0], np.flatnonzero(arrays["timeouts"])[:-1] + 1])
        return arrays["observations"][rows, :2]

    assert np.abs(starts(data)).max() <= 0.1
    task = small("antmaze-umaze-diverse-v0", limit=30)
    diverse = simulate(task, 40 * 30, seed=0, recipe=Recipe())
    assert len(np.unique(np.rint(starts(diverse) / 4), axis=0)) >= 5


def test_actions_are_within_the_box_and_all_is_finite(data):
    assert np.abs(data["actions"]).max() <= 1
    assert np.isfinite(data["observations"]).all()


def test_the_same_seed_gives_the_same_data_on_any_threads():
    one, two, other = (
        simulate(small(limit=60), 1200, seed, Recipe(), threads)
        for seed, threads in ((3, 1), (3, 2), (4, 2))
    )
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)
    assert (one["observations"] != other["observations"]).any()


def test_statistics_of_a_hand_made_data_set():
    hits = np.array([0, 1, 1, 0, 0, 0, 0, 1], bool)
    ends = np.array([0, 0, 0, 1, 0, 1, 0, 1], bool)
    facts = statistics({"rewards": hits.astype(np.float32), "terminals": hits, "timeouts": ends})
    assert facts == {
        "transitions": 8,
        "episodes": 3,
        "success": 2 / 3,
        "mean_return": 1.0,
        "terminal_share": 3 / 8,
        "mean_length": pytest.approx(8 / 3),
        "median_steps_to_goal": 2.0,
    }

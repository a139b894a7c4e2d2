"""Do others' policies earn here what they earned on MuJoCo 2.1.0? Their returns beside published.

    python -m experiments.d4rl_policies FOLDER      # 40 episodes each: two minutes of an idle core

FOLDER has these files, or some of them. They are others' (Apache-2.0) and no part of this project:

    d4rl_hopper_online_10.npz     D4RL's own policies, from google-research/deep_ope
    d4rl_walker_online_10.npz
    dapg_pen_policy.npz           DAPG's expert, from aravindr93/hand_dapg
    d4rl_ant_policy.npz           the walker behind D4RL's antmaze data, from D4RL

DAPG's file has a network's weights w0, w1, w2 (out, in) and biases b0, b1, b2 with tanh between,
and log_std. The others have fc0, fc1 and last_fc with ReLU between, last_fc_log_std beside last_fc,
each a .weight (out, in) and a .bias; an action is the tanh of a normal draw.

The walker and the one of our generated data (tasks/walker.py) walk the umaze by the same planner.
Writes runs/experiments/d4rl_policies.json.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tasks
from bench.folders import add_results_option, make_folder
from tasks.antmaze import MazeWorld, at_goal
from tasks.antmaze_data import Planner
from tasks.walker import walk
from trainer.folder import save_json
from trainer.provenance import describe
from trainer.terminal import steady_output

Network = dict[str, np.ndarray]


class Published(NamedTuple):
    """A policy, and the return that is published for it."""

    file: str
    task: str
    published: float
    plus_minus: float  # D4RL's: over episodes, as ours show; DAPG's is far smaller than that


PUBLISHED = (
    Published("d4rl_hopper_online_10.npz", "hopper-medium-v2", 1290.8, 86.0),
    Published("d4rl_walker_online_10.npz", "walker2d-medium-v2", 4120.9, 468.0),
    Published("dapg_pen_policy.npz", "pen-human-v1", 3233.0, 121.0),
)
WALKER = "d4rl_ant_policy.npz"
WALKS_PER_EPISODE = 5  # walks are short, and a share of goals needs many
NOISES = (0.0, 0.2)  # σ of normal noise added to a walker's actions; D4RL's data have 0.2


def load(path: Path) -> Network:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def squashed_normal(net: Network, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Actions (k, A) of a soft actor-critic's policy in states (k, S)."""
    hidden = states
    for layer in ("fc0", "fc1"):
        hidden = np.maximum(hidden @ net[f"{layer}.weight"].T + net[f"{layer}.bias"], 0.0)
    mean, log_std = (
        hidden @ net[f"{layer}.weight"].T + net[f"{layer}.bias"]
        for layer in ("last_fc", "last_fc_log_std")
    )
    std = np.exp(np.clip(log_std, -20.0, 2.0))
    return np.tanh(mean + std * rng.standard_normal(mean.shape))


def normal(net: Network, states: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Actions (k, A) of DAPG's policy in states (k, S).

    Drawn, as D4RL does for its data. The mean earns 3 % more, which the published figure does not
    tell apart.
    """
    hidden = np.tanh(states @ net["w0"].T + net["b0"])
    mean = np.tanh(hidden @ net["w1"].T + net["b1"]) @ net["w2"].T + net["b2"]
    return mean + np.exp(net["log_std"]) * rng.standard_normal(mean.shape)


def earn(policy: Published, folder: Path, n_episodes: int) -> dict:
    """A policy's returns here."""
    net, rng = load(folder / policy.file), np.random.default_rng(0)
    act = partial(normal if "log_std" in net else squashed_normal, net, rng=rng)
    returns = tasks.get(policy.task).evaluate(act, n_episodes, seed=0).returns
    mean = float(returns.mean())
    error = float(returns.std(ddof=1) / np.sqrt(n_episodes))
    return {
        **policy._asdict(),
        "here": mean,
        "standard_error": error,
        "difference_in_standard_errors": (mean - policy.published) / error,
        "returns": returns.tolist(),
    }


def d4rls_walk(net: Network, rng, qpos: np.ndarray, qvel: np.ndarray, heading: np.ndarray):
    states = np.concatenate([qpos[:, 2:], qvel, 10.0 * heading], axis=1)
    return squashed_normal(net, states, rng)


def walk_umaze(walker: Callable, noise: float, n_episodes: int, rng: np.random.Generator) -> dict:
    """The share of ants that get to their goals, and these ones' mean steps and speed.

    walker: qpos (k, 15), qvel (k, 14), unit directions to waypoints (k, 2) -> actions (k, 8)
    """
    task, planner = tasks.get("antmaze-umaze-v0"), Planner("umaze")
    running, walked = np.arange(n_episodes), np.zeros(n_episodes)
    steps = np.full(n_episodes, task.episode_limit)
    with MazeWorld(task.maze, n_episodes) as world:
        world.reset(running, rng)
        qpos, qvel = world.simulation.qpos, world.simulation.qvel
        for t in range(task.episode_limit):
            xy = qpos[running, :2].copy()
            following = planner.next_cell[planner.goal_cell, planner.cell(xy)]
            in_sight = (following == planner.goal_cell)[:, None]
            heading = np.where(in_sight, world.goals[running], planner.centers[following]) - xy
            heading /= np.linalg.norm(heading, axis=1, keepdims=True)
            actions = walker(qpos[running], qvel[running], heading)
            actions = actions + noise * rng.standard_normal(actions.shape)
            _, over = world.step(running, actions, rng)
            walked[running] += np.linalg.norm(qpos[running, :2] - xy, axis=1)
            steps[running[over]] = t + 1
            running = running[~over]
            if not len(running):
                break
        reached = at_goal(qpos[:, :2], world.goals)
    speed = walked / (steps * task.step_seconds)
    return {
        "success": float(reached.mean()),
        "steps_to_goal": float(steps[reached].mean()) if reached.any() else None,
        "metres_per_second": float(speed[reached].mean()) if reached.any() else None,
    }


def compare_walkers(folder: Path, n_episodes: int) -> list[dict]:
    found = []
    for noise in NOISES:
        rng = np.random.default_rng(0)
        d4rls = partial(d4rls_walk, load(folder / WALKER), rng)
        for name, walker in (("D4RL's", d4rls), ("ours", walk)):
            figures = walk_umaze(walker, noise, n_episodes, np.random.default_rng(1))
            found.append({"walker": name, "noise": noise, **figures})
    return found


@steady_output()
def main(argv: list[str] | None = None) -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("folder", type=Path, help="with the policies' .npz files")
    parser.add_argument("--episodes", type=int, default=40)
    add_results_option(parser, "experiments")
    asked = parser.parse_args(argv)
    present = [policy for policy in PUBLISHED if (asked.folder / policy.file).exists()]
    has_walker = (asked.folder / WALKER).exists()
    if not present and not has_walker:
        raise SystemExit(f"{asked.folder} has no policy; --help says which files belong there")
    if asked.episodes < 2:
        raise SystemExit("--episodes must be at least 2, for a standard error")
    make_folder(asked.out)

    rows = []
    for policy in present:
        row = earn(policy, asked.folder, asked.episodes)
        rows.append(row)
        here = f"{row['here']:.0f} ± {row['standard_error']:.0f}"
        there = f"{policy.published:.0f} ± {policy.plus_minus:.0f}"
        distance = f"{row['difference_in_standard_errors']:+.1f} standard errors"
        print(f"{policy.file:28}{here:>14} published{there:>14}{distance:>22}", flush=True)
    n_walks = WALKS_PER_EPISODE * asked.episodes
    walkers = compare_walkers(asked.folder, n_walks) if has_walker else []
    for row in walkers:
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    about = {**describe(), "episodes": asked.episodes, "walks": n_walks}
    path = asked.out / "d4rl_policies.json"
    save_json(path, {**about, "returns": rows, "walkers": walkers})
    print(f"figures in {path}")


if __name__ == "__main__":
    main()

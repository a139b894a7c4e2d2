"""D4RL's antmaze-*-v0 tasks on today's MuJoCo: the mazes, the ant, many ants at once, and an evaluation.

An ant with eight torque-driven joints stands at one end of a maze and is rewarded once, when its torso is
within half a metre of a goal at the other end. It is never told where the goal is: what it has learned to do
is to go there.

    MAZES, free_cells, cell_xy, sample_goals    the layouts, in cells of 4 m; the ant starts at (0, 0)
    build_model, sample_states, AntBatch        the physics, for one ant and for hundreds stepped at once
    AntMaze                                     one task by its D4RL name: limits, score, evaluate, draw_paths

The same task as a gymnasium environment is tasks.antmaze_env.AntMazeEnv.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from mujoco.rollout import Rollout

from atomic import written_whole

from .task import Episodes, TaskError

# '1' wall, '0' free, 'R' where the ant starts, 'G' where its goal lies. Rows go to +y, columns to +x.
MAZES: dict[str, list[str]] = {
    "umaze": [
        "11111",
        "1R001",
        "11101",
        "1G001",
        "11111",
    ],
    "medium": [
        "11111111",
        "1R011001",
        "10010001",
        "11000111",
        "10010001",
        "10100101",
        "100010G1",
        "11111111",
    ],
    "large": [
        "111111111111",
        "1R0001000001",
        "101101010101",
        "100000010001",
        "101111011101",
        "100101000001",
        "110101010111",
        "100100010G01",
        "111111111111",
    ],
}
CELL = 4.0  # metres
WALL_HEIGHT = 2.0
GOAL_RADIUS = 0.5
STATE_DIM, ACTION_DIM = 29, 8
N_QPOS, N_QVEL = 15, 14
FRAME_SKIP = 5  # simulation steps of 0.02 s in one environment step
TORQUE = 30.0  # ctrl = TORQUE * action


# ------------------------------------------------------------------------------------------------------------
# The maze


def free_cells(maze: str) -> np.ndarray:
    """The (row, col) of every cell that is not a wall, row by row: (K, 2) int."""
    rows = _rows(maze)
    return np.array([(r, c) for r, row in enumerate(rows) for c, mark in enumerate(row) if mark != "1"])


def cell_xy(maze: str, row: int, col: int) -> tuple[float, float]:
    """The middle of a cell in metres. The origin is the middle of the cell the ant starts in."""
    start_row, start_col = _marked_cells(maze, "R")[0]
    return CELL * (col - start_col), CELL * (row - start_row)


def sample_goals(maze: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """D4RL's goals: a goal cell's middle + U(0, 1) + U(0, 0.5) per axis, never below 0. (n, 2) metres."""
    middles = np.array([cell_xy(maze, row, col) for row, col in _marked_cells(maze, "G")])
    goals = middles[rng.integers(len(middles), size=n)]
    goals = goals + rng.uniform(0.0, CELL / 4, (n, 2)) + rng.uniform(0.0, CELL / 8, (n, 2))
    return np.maximum(goals, 0.0)


def _rows(maze: str) -> list[str]:
    if maze not in MAZES:
        raise TaskError(f"no maze is called {maze!r}; choose one of {', '.join(MAZES)}")
    return MAZES[maze]


def _marked_cells(maze: str, mark: str) -> list[tuple[int, int]]:
    return [(r, c) for r, row in enumerate(_rows(maze)) for c, here in enumerate(row) if here == mark]


# ------------------------------------------------------------------------------------------------------------
# The physics


def build_model(maze: str) -> mujoco.MjModel:
    """D4RL's ant between the walls of a maze, made from gymnasium's ant.xml.

    gymnasium's ant differs from D4RL's in four things, put back here: the time step, the actuators' gear and
    range, and the contacts' solimp. MuJoCo itself differs from D4RL's in how it joins two geoms' contact
    margins (margins_add).
    """
    rows = _rows(maze)
    spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
    spec.option.timestep = 0.02
    for actuator in spec.actuators:
        actuator.gear[0] = 1.0
        actuator.ctrlrange = [-TORQUE, TORQUE]
    for row, col in [(r, c) for r in range(len(rows)) for c in range(len(rows[0])) if rows[r][c] == "1"]:
        spec.worldbody.add_geom(
            name=f"wall_{row}_{col}",
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[*cell_xy(maze, row, col), WALL_HEIGHT / 2],
            size=[CELL / 2, CELL / 2, WALL_HEIGHT / 2],
            contype=1,
            conaffinity=1,
        )
    for geom in spec.geoms:
        geom.solimp[:3] = [0.8, 0.8, 0.01]
    model = spec.compile()
    if margins_add():
        model.geom_margin[:] *= 0.5
    return model


@lru_cache(maxsize=1)
def margins_add() -> bool:
    """Whether this MuJoCo adds two geoms' contact margins, as from 3.5 on, or takes their maximum.

    D4RL's took the maximum. Every geom of the ant's model has the same margin, so halving them all where they
    add restores it. Tried on two spheres 0.15 apart with a margin of 0.1 each, which touch only if it adds,
    rather than read off a version number.
    """
    sphere = '<body pos="0 0 {}"><freejoint/><geom size="1" margin="0.1"/></body>'
    xml = f"<mujoco><worldbody>{sphere.format(0)}{sphere.format(2.15)}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return data.ncon > 0


def sample_states(model: mujoco.MjModel, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """D4RL's reset: qpos (n, 15) = qpos0 + U(±0.1), its quaternion normalised; qvel (n, 14) = 0.1 N(0, 1)."""
    qpos = model.qpos0 + rng.uniform(-0.1, 0.1, (n, N_QPOS))
    qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
    return qpos, 0.1 * rng.standard_normal((n, N_QVEL))


class AntBatch:
    """n ants, each alone in its own copy of a maze, stepped together on all cores. A context manager.

    qpos (n, 15), qvel (n, 14) and observations (n, 29) = [qpos, qvel] are views of the float64 state: they
    follow every step, and writing to them moves an ant. The solver starts cold at each environment step, so
    that a step is a function of the observation and the action alone.
    """

    def __init__(self, maze: str, n: int, n_threads: int | None = None):
        self.model = build_model(maze)
        n_threads = min(n_threads or available_cores(), n)
        state_size = mujoco.mj_stateSize(self.model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        self._state = np.zeros((n, state_size))  # MuJoCo's order: time, qpos, qvel; the ant has nothing more
        self.qpos = self._state[:, 1 : 1 + N_QPOS]
        self.qvel = self._state[:, 1 + N_QPOS : 1 + STATE_DIM]
        self.observations = self._state[:, 1 : 1 + STATE_DIM]
        self.qpos[:] = self.model.qpos0
        self._rollout = Rollout(nthread=n_threads)
        self._data = [mujoco.MjData(self.model) for _ in range(n_threads)]

    def reset(self, indices: np.ndarray, rng: np.random.Generator) -> None:
        """Put these ants back to the start, each in a state drawn by sample_states."""
        self.qpos[indices], self.qvel[indices] = sample_states(self.model, len(indices), rng)

    def step(self, actions: np.ndarray, indices: np.ndarray | None = None) -> None:
        """One environment step of 0.1 s. Row i of actions (k, 8), clipped to [-1, 1], moves ant indices[i].

        Without indices every ant moves. Raises TaskError if actions have another shape or are not all finite.
        """
        indices = np.arange(len(self._state)) if indices is None else np.asarray(indices)
        if not len(indices):
            return
        control = TORQUE * checked_actions(actions, (len(indices), ACTION_DIM))
        start = self._state[indices]
        start[:, 0] = 0.0
        control = np.repeat(control[:, None], FRAME_SKIP, axis=1)
        states, _ = self._rollout.rollout(self.model, self._data, start, control)
        self._state[indices] = states[:, -1]

    def close(self) -> None:
        self._rollout.close()

    def __enter__(self) -> "AntBatch":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def checked_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Actions as float64, clipped to [-1, 1] as D4RL does. TaskError if not finite or of another shape."""
    actions = np.asarray(actions, dtype=np.float64)
    if actions.shape != shape:
        raise TaskError(f"actions have shape {actions.shape}, not {shape}; give 8 numbers for each ant")
    if not np.isfinite(actions).all():
        raise TaskError("actions hold NaN or infinity; check the policy that made them")
    return np.clip(actions, -1.0, 1.0)


def available_cores() -> int:
    """The cores this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------
# The task


@dataclass(frozen=True)
class AntMaze:
    """One of D4RL's antmaze-*-v0 tasks. A plain value; tasks.get(name) returns one."""

    name: str  # "antmaze-umaze-v0"
    maze: str  # a key of MAZES
    diverse: bool  # of the data, not the maze: from random starts to random goals
    episode_limit: int  # environment steps
    dataset_file: str  # below D4RL's base URL
    state_dim: int = STATE_DIM
    action_dim: int = ACTION_DIM
    max_action: float = 1.0
    ref_min: float = 0.0
    ref_max: float = 1.0

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        """D4RL's score, 0 for ref_min to 100 for ref_max; here simply the percentage of goals reached."""
        return 100.0 * (np.asarray(returns) - self.ref_min) / (self.ref_max - self.ref_min)

    def evaluate(
        self,
        act: Callable[[np.ndarray], np.ndarray],
        n_episodes: int,
        seed: int,
        n_threads: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Episodes:
        """Walk n_episodes at once, with one call of act for all of them each step.

        act maps the observations (k, 29) float32 of k running episodes to actions (k, 8) in [-1, 1];
        on_step(t, k), if given, is called after step t with the k that are left. seed and act determine all.

        Each episode has a goal of its own, as a newly made environment has in D4RL v0. The authors run
        all episodes in one environment, hence with one goal: the same expected score, with more variance.

        Raises TaskError for actions that are not finite or not (k, 8).
        """
        if n_episodes < 1:
            raise TaskError(f"an evaluation needs at least one episode, not {n_episodes}")
        rng = np.random.default_rng(seed)
        goals = sample_goals(self.maze, n_episodes, rng)
        alive = np.arange(n_episodes)
        returns = np.zeros(n_episodes)
        lengths = np.full(n_episodes, self.episode_limit)
        positions = np.zeros((self.episode_limit + 1, n_episodes, 2))
        with AntBatch(self.maze, n_episodes, n_threads) as ants:
            ants.reset(alive, rng)
            positions[0] = ants.qpos[:, :2]
            for t in range(1, self.episode_limit + 1):
                ants.step(act(ants.observations[alive].astype(np.float32)), alive)
                positions[t] = ants.qpos[:, :2]
                reached = alive[at_goal(positions[t, alive], goals[alive])]
                returns[reached] = 1.0
                lengths[reached] = t
                alive = np.setdiff1d(alive, reached)
                if on_step is not None:
                    on_step(t, len(alive))
                if not len(alive):
                    break
        paths = [positions[: length + 1, i].copy() for i, length in enumerate(lengths)]
        return Episodes(returns, lengths, paths, goals)

    def draw_paths(self, episodes: Episodes, path: str | Path, title: str) -> None:
        """Draw the walked paths as a PNG file, atomically. Raises TaskError if it cannot be written."""
        try:
            with written_whole(path) as temporary:
                _figure(self.maze, episodes, title).savefig(temporary, dpi=120, format="png")
        except OSError as error:
            raise TaskError(f"cannot write the picture {path}: {error.strerror or error}") from error


def at_goal(xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Whether positions (..., 2) are within GOAL_RADIUS of goals (..., 2)."""
    return np.linalg.norm(xy - goal, axis=-1) <= GOAL_RADIUS


# ------------------------------------------------------------------------------------------------------------
# The picture

FLOOR, WALL, REACHED, FAILED, GOAL, START = "#f7f5f0", "#8d99ae", "#0072b2", "#d55e00", "#2a9d5c", "#222222"


def _figure(maze: str, episodes: Episodes, title: str) -> Figure:
    walls = np.array([[mark == "1" for mark in row] for row in MAZES[maze]])
    n_rows, n_cols = walls.shape
    left, bottom = np.array(cell_xy(maze, 0, 0)) - CELL / 2
    extent = (left, left + CELL * n_cols, bottom, bottom + CELL * n_rows)

    figure = Figure(figsize=(7.0, 7.0 * (n_rows - 1.5) / (n_cols - 1.5) + 0.75), layout="constrained")
    axes = figure.add_subplot(xlabel="x (m)", ylabel="y (m)")
    axes.imshow(walls, cmap=ListedColormap([FLOOR, WALL]), extent=extent, origin="lower")
    faint = max(0.06, 0.5 / len(episodes.goals))
    for goal in episodes.goals:
        axes.add_patch(Circle(goal, GOAL_RADIUS, color=GOAL, alpha=faint, linewidth=0))

    reached = episodes.returns > 0
    kinds = ((reached, REACHED, "reached the goal"), (~reached, FAILED, "did not reach it"))
    width = float(np.interp(len(reached), [10, 100], [1.6, 0.7]))  # thin where they are many
    for chosen, colour, label in kinds:
        paths = [episodes.paths[i] for i in np.flatnonzero(chosen)]
        axes.add_collection(LineCollection(paths, colors=colour, linewidths=width, alpha=0.75))
        ends = np.array([path[-1] for path in paths]).reshape(-1, 2)
        label = f"{label}: {len(paths)}"
        axes.scatter(*ends.T, s=14, color=colour, edgecolors="white", linewidths=0.5, zorder=3, label=label)
    start = np.mean([path[0] for path in episodes.paths], axis=0)
    axes.scatter(*start, marker="*", s=130, color=START, edgecolors="white", zorder=4, label="start")
    axes.scatter([], [], s=110, color=GOAL, alpha=0.6, label="goals")
    rim = 0.75 * CELL  # of the outer walls, all that needs to be seen is that they are there
    axes.set(xlim=(extent[0] + rim, extent[1] - rim), ylim=(extent[2] + rim, extent[3] - rim))
    axes.set_title(title, fontsize=9)  # two lines, the second the data's name, must fit the width
    axes.locator_params(steps=[2, 4, 8])
    axes.spines[:].set_visible(False)
    labels = axes.get_legend_handles_labels()
    legend = figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([90])
    return figure

"""D4RL's antmaze-*-v0 tasks on today's MuJoCo: the mazes, the ant, many ants at once.

An ant with eight torque-driven joints starts at one end of a maze. It is rewarded once, when its
torso is within half a metre of a goal at the other end. The goal is not observed.

    MAZES, free_cells, cell_xy, sample_goals    layouts in cells of 4 m; the ant starts at (0, 0)
    build_model, sample_states, AntBatch        the physics, for one ant and for hundreds at once
    AntMaze                                     a task: limits, score, evaluate, draw

The same task as a gymnasium environment is tasks.antmaze_env.AntMazeEnv.
"""

from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from .simulation import Simulation, checked_actions, compile_spec, load_spec
from .task import TITLE_SIZE, Episodes, Task, TaskError, World

# '1' wall, '0' free, 'R' the ant's start, 'G' its goal. Rows go to +y, columns to +x.
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
CELL = 4.0  # metres, as all lengths here
WALL_HEIGHT = 2.0
GOAL_RADIUS = 0.5
STATE_DIM, ACTION_DIM = 29, 8
N_QPOS, N_QVEL = 15, 14
FRAME_SKIP = 5  # simulation steps of 0.02 s in one environment step
TORQUE = 30.0  # ctrl = TORQUE * action


# ---- The maze ------------------------------------------------------------------------------------


def free_cells(maze: str) -> np.ndarray:
    """The (row, col) of every cell that is not a wall, row by row: (K, 2) int."""
    return np.array(marked_cells(maze, "0RG"))


def cell_xy(maze: str, row: int, col: int) -> tuple[float, float]:
    """The middle of a cell in metres. The origin is the middle of the cell the ant starts in."""
    start_row, start_col = marked_cells(maze, "R")[0]
    return CELL * (col - start_col), CELL * (row - start_row)


def sample_goals(maze: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """D4RL's goals (n, 2), metres.

    On each axis a goal is a goal cell's middle + U(0, 1) + U(0, 0.5), but at least 0.
    """
    middles = np.array([cell_xy(maze, row, col) for row, col in marked_cells(maze, "G")])
    goals = middles[rng.integers(len(middles), size=n)]
    goals = goals + rng.uniform(0.0, CELL / 4, (n, 2)) + rng.uniform(0.0, CELL / 8, (n, 2))
    return np.maximum(goals, 0.0)


def marked_cells(maze: str, marks: str) -> list[tuple[int, int]]:
    """The (row, col) of every cell with one of these marks, row by row.

    Raises TaskError for an unknown maze.
    """
    if maze not in MAZES:
        raise TaskError(f"no maze is called {maze!r}; choose one of {', '.join(MAZES)}")
    rows = MAZES[maze]
    return [(r, c) for r, row in enumerate(rows) for c, mark in enumerate(row) if mark in marks]


# ---- The physics ---------------------------------------------------------------------------------


def build_model(maze: str) -> mujoco.MjModel:
    """D4RL's ant between the walls of a maze, made from gymnasium's ant.xml.

    gymnasium's ant differs from D4RL's in four things, which are restored here: the time step, the
    actuators' gear and range, and the contacts' solimp. Raises TaskError for an unknown maze.
    """
    walls = marked_cells(maze, "1")
    spec = load_spec("gymnasium", "envs/mujoco/assets/ant.xml")
    spec.option.timestep = 0.02
    for actuator in spec.actuators:
        actuator.gear[0] = 1.0
        actuator.ctrlrange = [-TORQUE, TORQUE]
    for row, col in walls:
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
    return compile_spec(spec)


def sample_states(
    model: mujoco.MjModel, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """D4RL's reset: qpos (n, 15) = qpos0 + U(±0.1), qvel (n, 14) = 0.1 N(0, 1).

    The quaternion in qpos is normalised.
    """
    qpos = model.qpos0 + rng.uniform(-0.1, 0.1, (n, N_QPOS))
    qpos[:, 3:7] /= np.linalg.norm(qpos[:, 3:7], axis=1, keepdims=True)
    return qpos, 0.1 * rng.standard_normal((n, N_QVEL))


class AntBatch:
    """n ants, each alone in its own copy of a maze, stepped together on all cores.

    A context manager. qpos (n, 15), qvel (n, 14) and observations (n, 29) = [qpos, qvel] are
    Simulation's views of the state: they follow every step, and writing to them moves an ant.
    """

    def __init__(self, maze: str, n: int, n_threads: int | None = None):
        self.simulation = Simulation(build_model(maze), n, n_threads)
        self.model = self.simulation.model
        self.qpos = self.simulation.qpos
        self.qvel = self.simulation.qvel
        self.observations = self.simulation.states

    def reset(self, indices: np.ndarray, rng: np.random.Generator) -> None:
        """Put these ants back to the start, each in a state drawn by sample_states."""
        self.simulation.place(indices, *sample_states(self.model, len(indices), rng))

    def step(self, actions: np.ndarray, indices: np.ndarray | None = None) -> None:
        """One environment step of 0.1 s.

        Row i of actions (k, 8), clipped to [-1, 1], moves ant indices[i]. Without indices every ant
        moves. Raises TaskError if actions have another shape or are not all finite.
        """
        indices = np.arange(len(self.qpos)) if indices is None else np.asarray(indices)
        actions = checked_actions(actions, (len(indices), ACTION_DIM))
        self.simulation.step(indices, TORQUE * actions, FRAME_SKIP)

    def close(self) -> None:
        self.simulation.close()

    def __enter__(self) -> "AntBatch":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---- The task ------------------------------------------------------------------------------------


class MazeWorld(World):
    """n ants, each with a goal of its own.

    trail: the positions (n, 2) of all ants after each reset and step.
    """

    def __init__(self, maze: str, n: int, n_threads: int | None = None):
        self.maze = maze
        self.ants = AntBatch(maze, n, n_threads)
        self.simulation = self.ants.simulation
        self.observations = self.ants.observations
        self.goals = np.zeros((n, 2))
        self.trail: list[np.ndarray] = []

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        self.goals[who] = sample_goals(self.maze, len(who), rng)
        self.ants.reset(who, rng)
        self.trail.append(self.ants.qpos[:, :2].copy())

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        self.ants.step(actions, who)
        self.trail.append(self.ants.qpos[:, :2].copy())
        reached = at_goal(self.ants.qpos[who, :2], self.goals[who])
        return reached.astype(float), reached


@dataclass(frozen=True)
class MazeEpisodes(Episodes):
    """Episodes with their paths and goals, metres."""

    paths: list[np.ndarray]  # N arrays (length + 1, 2), the starting point first
    goals: np.ndarray  # (N, 2)


@dataclass(frozen=True)
class AntMaze(Task):
    """One of D4RL's antmaze-*-v0 tasks. Its score is the percentage of goals reached."""

    maze: str  # a key of MAZES
    diverse: bool  # of the data, not the maze: from random starts to random goals
    family: ClassVar[str] = "antmaze"
    can_generate: ClassVar[bool] = True
    step_seconds: ClassVar[float] = 0.1

    def world(self, n: int, n_threads: int | None = None) -> MazeWorld:
        """Each episode has a goal of its own, like a new environment in D4RL v0.

        The authors run all episodes in one environment and so with one goal: the expected score is
        the same, its variance larger.
        """
        return MazeWorld(self.maze, n, n_threads)

    def _finish(self, world: MazeWorld, episodes: Episodes) -> MazeEpisodes:
        trail = np.stack(world.trail)
        paths = [trail[: length + 1, i].copy() for i, length in enumerate(episodes.lengths)]
        return MazeEpisodes(**vars(episodes), paths=paths, goals=world.goals)

    def _figure(self, episodes: MazeEpisodes, title: str) -> Figure:
        return draw_maze(self.maze, episodes, title)


def at_goal(xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Whether positions (..., 2) are within GOAL_RADIUS of goals (..., 2)."""
    return np.linalg.norm(xy - goal, axis=-1) <= GOAL_RADIUS


# ---- Pictures ------------------------------------------------------------------------------------

FLOOR, WALL, GOAL, START = "#f7f5f0", "#8d99ae", "#2a9d5c", "#222222"
REACHED, FAILED = "#0072b2", "#d55e00"


def draw_maze(maze: str, episodes: MazeEpisodes, title: str) -> Figure:
    """The maze from above, with every episode's path and goal."""
    walls = np.array([[mark == "1" for mark in row] for row in MAZES[maze]])
    n_rows, n_cols = walls.shape
    left, bottom = np.array(cell_xy(maze, 0, 0)) - CELL / 2
    extent = (left, left + CELL * n_cols, bottom, bottom + CELL * n_rows)

    height = 7.0 * (n_rows - 1.5) / (n_cols - 1.5) + 0.75
    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.add_subplot(xlabel="x (m)", ylabel="y (m)")
    axes.imshow(walls, cmap=ListedColormap([FLOOR, WALL]), extent=extent, origin="lower")
    faint = max(0.06, 0.5 / len(episodes.goals))
    for goal in episodes.goals:
        axes.add_patch(Circle(goal, GOAL_RADIUS, color=GOAL, alpha=faint, linewidth=0))

    reached = episodes.returns > 0
    kinds = ((reached, REACHED, "reached the goal"), (~reached, FAILED, "did not reach it"))
    width = float(np.interp(len(reached), [10, 100], [1.6, 0.7]))  # thin if there are many
    for chosen, colour, label in kinds:
        paths = [episodes.paths[i] for i in np.flatnonzero(chosen)]
        axes.add_collection(LineCollection(paths, colors=colour, linewidths=width, alpha=0.75))
        ends = np.array([path[-1] for path in paths]).reshape(-1, 2)
        dots = {"s": 14, "color": colour, "edgecolors": "white", "linewidths": 0.5, "zorder": 3}
        axes.scatter(*ends.T, **dots, label=f"{label}: {len(paths)}")
    start = np.mean([path[0] for path in episodes.paths], axis=0)
    star = {"marker": "*", "s": 130, "color": START, "edgecolors": "white", "zorder": 4}
    axes.scatter(*start, **star, label="start")
    axes.scatter([], [], s=110, color=GOAL, alpha=0.6, label="goals")
    rim = 0.75 * CELL  # crop the outer walls
    axes.set(xlim=(extent[0] + rim, extent[1] - rim), ylim=(extent[2] + rim, extent[3] - rim))
    axes.set_title(title, fontsize=TITLE_SIZE)
    axes.locator_params(steps=[2, 4, 8])
    axes.spines[:].set_visible(False)
    labels = axes.get_legend_handles_labels()
    legend = figure.legend(*labels, loc="outside lower center", ncols=4, frameon=False)
    for handle in legend.legend_handles:
        handle.set_sizes([90])
    return figure

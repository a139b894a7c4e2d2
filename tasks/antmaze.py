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

from .simulation import Simulation, checked_actions, compile_spec, load_spec
from .task import Episodes, Task, TaskError, World

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
ACTION_DIM = 8
N_QPOS, N_QVEL = 15, 14
FRAME_SKIP = 5  # simulation steps of 0.02 s in one environment step
TORQUE = 30.0  # ctrl = TORQUE * action
FLOOR_COLOUR = [0.92, 0.91, 0.88, 1.0]
WALL_COLOUR = [0.42, 0.52, 0.66, 1.0]
ANT_COLOUR = [0.85, 0.36, 0.10, 1.0]
GOAL_COLOUR = [0.15, 0.70, 0.30, 1.0]


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
    goal = cell_xy(maze, *marked_cells(maze, "G")[0])
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
    disc = {"type": mujoco.mjtGeom.mjGEOM_CYLINDER, "size": [GOAL_RADIUS, 0.03, 0.0]}
    spec.worldbody.add_site(name="goal", pos=[*goal, 0.03], rgba=GOAL_COLOUR, **disc)
    model = compile_spec(spec)
    paint(model)
    return model


def paint(model: mujoco.MjModel) -> None:
    """Pale floor, blue walls, orange ant, light from behind the camera. Physics is unchanged."""
    model.geom_matid[:] = -1
    model.geom_rgba[:] = ANT_COLOUR
    model.geom_rgba[model.geom_type == int(mujoco.mjtGeom.mjGEOM_BOX)] = WALL_COLOUR
    floor = model.geom("floor").id
    model.geom_rgba[floor] = FLOOR_COLOUR
    model.geom_size[floor, :2] = 0.0  # infinite: gymnasium's 40 m do not cover the large maze
    headlight = model.vis.headlight
    headlight.ambient[:] = 0.45
    headlight.diffuse[:] = 0.25
    headlight.specular[:] = 0.0
    model.light_dir[0] = [0.4, 0.5, -1.0]
    model.light_diffuse[0] = 0.45
    model.light_specular[0] = 0.0


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

    @property
    def qpos(self) -> np.ndarray:
        return self.simulation.qpos

    @property
    def qvel(self) -> np.ndarray:
        return self.simulation.qvel

    @property
    def observations(self) -> np.ndarray:
        return self.simulation.states

    def reset(self, indices: np.ndarray, rng: np.random.Generator) -> None:
        """Put these ants back to the start, each in a state drawn by sample_states."""
        self.simulation.place(indices, *sample_states(self.simulation.model, len(indices), rng))

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

    goals (n, 2): NaN before an ant's first reset.
    trail: the positions (n, 2) of all ants at the last reset, and after each step since.
    """

    def __init__(self, maze: str, n: int, n_threads: int | None = None):
        self.maze = maze
        self.ants = AntBatch(maze, n, n_threads)
        self.simulation = self.ants.simulation
        self.goals = np.full((n, 2), np.nan)
        self.trail: list[np.ndarray] = []

    @property
    def observations(self) -> np.ndarray:
        return self.ants.observations

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        self.goals[who] = sample_goals(self.maze, len(who), rng)
        self.restart(who, rng)

    def restart(self, who: np.ndarray, rng: np.random.Generator) -> None:
        """Put these ants back to the start; their goals stay."""
        self.ants.reset(who, rng)
        self.trail = [self.ants.qpos[:, :2].copy()]

    def posed(self) -> mujoco.MjData:
        self.simulation.model.site("goal").pos[:2] = self.goals[0]
        return super().posed()

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

    def camera(self, model: mujoco.MjModel, aspect: float) -> mujoco.MjvCamera:
        """Looking down at the middle of the maze, far enough away to see all of it."""
        corners = np.array([cell_xy(self.maze, row, col) for row, col in free_cells(self.maze)])
        lowest, highest = corners.min(axis=0), corners.max(axis=0)
        width, depth = highest - lowest + 8.0  # the free cells and half a wall around them
        camera = mujoco.MjvCamera()
        camera.lookat[:] = [*(lowest + highest) / 2, 0.0]
        camera.azimuth, camera.elevation = 90.0, -65.0
        camera.distance = 1.5 * max(depth, width / aspect)
        return camera

    def _figure(self, episodes: MazeEpisodes, title: str):
        from .pictures import draw_maze

        return draw_maze(self.maze, episodes, title)


def at_goal(xy: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Whether positions (..., 2) are within GOAL_RADIUS of goals (..., 2)."""
    return np.linalg.norm(xy - goal, axis=-1) <= GOAL_RADIUS

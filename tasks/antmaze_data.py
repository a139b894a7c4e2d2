"""A local stand-in for D4RL's antmaze data: many ants walk the maze, their steps become a D4RL HDF5 file.

D4RL made its antmaze data with a waypoint planner over the maze and a trained ant controller. This does
the same with the 50-constant controller of walker.py, for where D4RL's files cannot be had. It is another
data set, not a copy: scores on it must be quoted for it.

How the data are made
    Planner   breadth-first search over the maze's cells gives, for each target cell, the next cell from
              everywhere; the ant walks to that cell's centre, moved a little once per trajectory so that
              paths differ.
    Goal      each trajectory has one goal, drawn in the goal cell as D4RL draws it. The walker does not
              know where in the cell it is: heading for "the goal" is walking to fresh draws of a goal.
              The observation holds no goal, so a walker that knew it would show actions that no policy of
              the observation can choose, and would make every way through the goal cell look like the
              right one.
    Straying  now and then the ant walks in a random direction for a while, whatever is there.
    Targets   on arrival the ant draws a new target: with probability `wander` any free cell, else the goal cell.
    Start     umaze: the robot's cell, as in the task itself. All others: any free cell (D4RL's
              "multistart").
    Diverse   nearly all targets are any cell (D4RL's "multigoal"); rewards remain those of the task's own goal.
    End       a few steps after touching the goal, or hovering there would fill the data with terminals; at the task's
              episode limit; or soon after an ant has fallen on its back or is stuck. Always by timeout, as in D4RL.
How they were tuned
    By hand, on pictures of the evaluated paths, with single runs of 10,000 to 40,000 updates at a rate of 1e-3 decaying to 0,
    50 episodes, on 200,000 to 1,000,000 transitions. The runs were not kept: take the scores as hints, ±7 % each.
    A clone takes its heading from its own velocity more than from its place, so once beside the path it goes on into the
    wall, and stays there. `lookahead` is there so that the data show the way back. Cloning then reached 54 % at 30,000
    updates without straying (wander 0.3), and 32 % at 40,000 with it (wander 0.5).
    Without straying no data show the walls, and Q took being pressed against one for as good as walking beside it:
    Diffusion-QL had 10, 38 and 24 % after 20,000 updates (three seeds, wander 0.65). With the straying cut out of the
    data, only the way back being kept, 22 % after 10,000; with all of it in the data, 40 %, and 26 % at 15,000. It stayed in.
    `linger` then set the share of terminals: 1.04 % at 3, D4RL's umaze-v0 having about 1 %.
Data semantics
    rewards[i] = 1 and terminals[i] = True when the state *after* actions[i] is within 0.5 of the goal, as
    the task's own step has it; so (s_i, a_i, r_i, s_{i+1}, done_i) is a transition of the evaluation's
    environment. timeouts[i] marks a trajectory's last step, whose next state is not stored.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .antmaze import CELL, MAZES, AntBatch, AntMaze, at_goal, cell_xy, free_cells, sample_goals
from .walker import walk

VERSION = 2  # raise it whenever the same seed would give other data: part of the cached file's name
MAX_ANTS = 512  # enough to hide numpy's overhead behind the physics


@dataclass(frozen=True)
class Recipe:
    """What makes the data suboptimal and diverse, so that cloning them is not enough."""

    # σ of a trajectory's action noise ~ U: no two trajectories are equally good at walking.
    noise: tuple[float, float] = (0.1, 0.3)
    # Share of targets that are any cell instead of the goal's, drawn anew on each arrival. A clone wanders as much;
    # a Q-function sees which moves pay.
    wander: float = 0.5
    wander_diverse: float = 0.85
    # U(±) metres per axis: spreads the paths over the corridors, which leave an ant a metre on each side.
    waypoint_jitter: float = 0.4
    # Metres: a waypoint counts as no further away than this along each axis. A cell is 4 m, so an ant beside its path comes
    # back to it early, and the data show how.
    lookahead: float = 1.5
    # Mean number of steps until an ant strays in a random direction, and for how many steps it does: to the walls, more often
    # than not. So the data say what pressing against a wall is worth.
    stray_every: float = 120
    stray: tuple[int, int] = (10, 40)
    # Steps a trajectory goes on after touching its goal; each is a terminal as long as it stays within 0.5 m.
    linger: int = 3
    # Steps on the back or within a circle of 1 m before a trajectory ends: some dead ants, since a policy
    # meets such states too, but not the hundreds of steps that a fall would otherwise last.
    patience: int = 60


class Planner:
    """Shortest paths over one maze's cells, which are numbered row by row."""

    def __init__(self, maze: str):
        rows = MAZES[maze]
        self.shape = (len(rows), len(rows[0]))
        self.origin = np.array(cell_xy(maze, 0, 0))
        self.free = np.array([self.number(row, col) for row, col in free_cells(maze)])
        self.goal_cell = self.number(
            *next((r, row.index("G")) for r, row in enumerate(rows) if "G" in row)
        )
        self.centers = np.array([cell_xy(maze, row, col) for row, col in np.ndindex(self.shape)])
        self.next_cell = np.stack([self._search(cell) for cell in range(len(self.centers))])

    def number(self, row: int, col: int) -> int:
        return int(row) * self.shape[1] + int(col)

    def cell(self, xy: np.ndarray) -> np.ndarray:
        """Cell numbers (n,) of positions (n, 2). Walls are centred on cells, hence the rounding."""
        col, row = np.rint((xy - self.origin) / CELL).astype(int).T
        return np.clip(row, 0, self.shape[0] - 1) * self.shape[1] + np.clip(
            col, 0, self.shape[1] - 1
        )

    def _search(self, target: int) -> np.ndarray:
        """The next cell (cells,) on the way to target from each; a wall's is a free neighbour, if any."""
        following = np.arange(len(self.centers))
        found, frontier = {target}, [target]
        while frontier:
            cell = frontier.pop(0)
            for neighbour in self._neighbours(cell):
                if neighbour not in found:
                    found.add(neighbour)
                    following[neighbour] = cell
                    if neighbour in self.free:
                        frontier.append(neighbour)
        return following

    def _neighbours(self, cell: int) -> list[int]:
        row, col = divmod(cell, self.shape[1])
        around = [(row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)]
        return [
            self.number(r, c)
            for r, c in around
            if 0 <= r < self.shape[0] and 0 <= c < self.shape[1]
        ]


class Herd:
    """What n walking ants have in mind: targets, waypoints, noise and moods. The physics is AntBatch's."""

    def __init__(self, task: AntMaze, n: int, rng: np.random.Generator, recipe: Recipe):
        self.task, self.rng, self.recipe, self.planner = task, rng, recipe, Planner(task.maze)
        self.goals, self.targets = np.zeros((n, 2)), np.zeros((n, 2))
        self.waypoints = np.zeros((n, *self.planner.centers.shape))
        self.noise = np.zeros((n, 1))
        self.anchor, self.idle = np.zeros((n, 2)), np.zeros(n, int)
        self.touched, self.lingered = np.zeros(n, bool), np.zeros(n, int)
        self.straying, self.astray = (
            np.zeros(n, int),
            np.zeros((n, 2)),
        )  # steps that remain, and in which direction

    def begin(self, who: np.ndarray) -> np.ndarray:
        """Start new trajectories for the ants who (k,), by index; returns their starting places (k, 2)."""
        rng, recipe, planner = self.rng, self.recipe, self.planner
        self.goals[who] = sample_goals(self.task.maze, len(who), rng)
        jitter = recipe.waypoint_jitter * rng.uniform(-1, 1, (len(who), *planner.centers.shape))
        self.waypoints[who] = planner.centers + jitter
        self.noise[who] = rng.uniform(*recipe.noise, (len(who), 1))
        self.idle[who], self.touched[who], self.lingered[who], self.straying[who] = 0, False, 0, 0
        self.aim(who)
        starts = planner.centers[rng.choice(planner.free, len(who))]
        starts = starts if multistart(self.task) else np.zeros((len(who), 2))
        self.anchor[who] = starts
        return starts

    def aim(self, who: np.ndarray) -> None:
        """New targets for the ants who (k,)."""
        planner, rng = self.planner, self.rng
        cells = rng.choice(planner.free, len(who))
        wander = self.recipe.wander_diverse if self.task.diverse else self.recipe.wander
        to_goal = (cells == planner.goal_cell) | (rng.random(len(who)) >= wander)
        goals = sample_goals(self.task.maze, len(who), rng)
        self.targets[who] = np.where(to_goal[:, None], goals, self.waypoints[who, cells])

    def actions(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Noisy actions (n, 8) of the ants at qpos (n, 15), qvel (n, 14)."""
        planner, xy = self.planner, qpos[:, :2]
        here, target_cell = planner.cell(xy), planner.cell(self.targets)
        step = planner.next_cell[target_cell, here]
        waypoint = self.waypoints[np.arange(len(xy)), step]
        heading = np.where((step == target_cell)[:, None], self.targets, waypoint) - xy
        heading = np.clip(heading, -self.recipe.lookahead, self.recipe.lookahead)
        heading /= np.linalg.norm(heading, axis=1, keepdims=True) + 1e-8
        self.stray()
        heading = np.where((self.straying > 0)[:, None], self.astray, heading)
        noisy = walk(qpos, qvel, heading) + self.noise * self.rng.standard_normal((len(xy), 8))
        return np.clip(noisy, -1, 1)

    def stray(self) -> None:
        """One step nearer to the end of straying for those who do; some of the others begin."""
        rng, n = self.rng, len(self.straying)
        begins = (self.straying == 0) & (rng.random(n) < 1 / self.recipe.stray_every)
        angle = rng.uniform(0, 2 * np.pi, n)
        self.astray[begins] = np.stack([np.cos(angle), np.sin(angle)], axis=1)[begins]
        duration = rng.integers(*self.recipe.stray, n, endpoint=True)
        self.straying = np.where(begins, duration, np.maximum(self.straying - 1, 0))

    def arrive(self, qpos: np.ndarray, touched: np.ndarray) -> np.ndarray:
        """Note who touched their goal (n,), give new targets to those who arrived; returns whose trajectory is over (n,)."""
        xy = qpos[:, :2]
        self.touched |= touched
        self.lingered += self.touched
        self.aim(np.flatnonzero(at_goal(xy, self.targets)))
        upright = (
            1 - 2 * (qpos[:, 4] ** 2 + qpos[:, 5] ** 2) > 0
        )  # the height of the torso's own z axis
        moved = np.linalg.norm(xy - self.anchor, axis=1) > 1
        self.anchor[moved] = xy[moved]
        self.idle = np.where(moved & upright, 0, self.idle + 1)
        return (self.idle >= self.recipe.patience) | (self.lingered > self.recipe.linger)


def multistart(task: AntMaze) -> bool:
    """Whether D4RL's data of this task start anywhere in the maze: all but umaze-v0 do."""
    return task.diverse or task.maze != "umaze"


def simulate(
    task: AntMaze, n_transitions: int, seed: int, recipe: Recipe, n_threads: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of the HDF5 file by key. Every ant walks equally many steps, its trajectories end to end."""
    n = min(MAX_ANTS, -(-n_transitions // task.episode_limit))
    n_steps = -(-n_transitions // n)
    rng = np.random.default_rng(seed)
    herd = Herd(task, n, rng, recipe)
    widths = {"observations": 29, "actions": 8, "infos/goal": 2}
    data = {key: np.zeros((n, n_steps, width), np.float32) for key, width in widths.items()}
    data |= {"terminals": np.zeros((n, n_steps), bool), "timeouts": np.zeros((n, n_steps), bool)}
    age = np.zeros(n, int)
    progress = tqdm(
        total=n * n_steps, unit=" transitions", disable=None
    )  # none where nobody watches
    with AntBatch(task.maze, n, n_threads) as ants, progress:
        begin(herd, ants, np.arange(n))
        for t in range(n_steps):
            data["observations"][:, t], data["infos/goal"][:, t] = ants.observations, herd.goals
            data["actions"][:, t] = herd.actions(ants.qpos, ants.qvel)
            ants.step(data["actions"][:, t])
            # In float32, as the next observation will be stored: a reader can check rewards to the last bit.
            touched = at_goal(ants.qpos[:, :2].astype(np.float32), data["infos/goal"][:, t])
            gave_up = herd.arrive(ants.qpos, touched)
            age += 1
            over = gave_up | (age >= task.episode_limit) | (t == n_steps - 1)
            data["terminals"][:, t], data["timeouts"][:, t] = touched, over
            begin(herd, ants, np.flatnonzero(over))
            age[over] = 0
            progress.update(n)
    data = {key: array.reshape(-1, *array.shape[2:])[:n_transitions] for key, array in data.items()}
    data["timeouts"][-1] = True
    data["rewards"] = data["terminals"].astype(np.float32)
    data["infos/qpos"], data["infos/qvel"] = (
        data["observations"][:, :15],
        data["observations"][:, 15:],
    )
    return data


def begin(herd: Herd, ants: AntBatch, who: np.ndarray) -> None:
    """Put the ants with the indices who (k,) at the start of new trajectories."""
    ants.reset(who, herd.rng)
    ants.qpos[who, :2] += herd.begin(who)


def statistics(data: dict[str, np.ndarray]) -> dict[str, float]:
    """What a data set holds, in numbers. A trajectory's return sums the rewards of all its visits."""
    ends = np.flatnonzero(data["timeouts"])
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    returns = np.add.reduceat(data["rewards"], starts)
    hits = np.flatnonzero(data["terminals"])
    episodes = np.searchsorted(ends, hits)
    reached, first = np.unique(episodes, return_index=True)
    steps_to_goal = hits[first] - starts[reached] + 1
    return {
        "transitions": len(data["rewards"]),
        "episodes": len(ends),
        "success": len(reached) / len(ends),  # share of trajectories that touch their goal
        "mean_return": float(returns.mean()),
        "terminal_share": float(data["terminals"].mean()),
        "mean_length": float(lengths.mean()),
        "median_steps_to_goal": float(np.median(steps_to_goal)) if len(reached) else float("nan"),
    }

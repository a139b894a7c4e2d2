"""A local stand-in for D4RL's antmaze data: many ants walk a maze and their steps are recorded.

D4RL made its antmaze data with a waypoint planner over the maze and a trained ant controller. This
does the same with the 50-constant controller of walker.py, for where D4RL's files are not
available. It is another data set, not a copy: a score on it must be quoted with its name.

How the data are made
    Planner   Breadth-first search over the maze's cells gives, for each target cell, the next cell
              from everywhere. The ant walks to that cell's centre, shifted a little once per
              trajectory so that paths differ.
    Goal      Each trajectory has one goal, drawn in the goal cell as D4RL draws it. The walker does
              not know it: to head for "the goal" is to walk to fresh draws of a goal. Observations
              do not contain the goal, so a walker that knew it would show actions that no policy
              of the observation can choose, and would make every way through the goal cell look
              like the right one.
    Straying  Now and then the ant walks in a random direction for a while, walls or not.
    Targets   On arrival the ant draws a new target: with probability `wander` any free cell, else
              the goal cell.
    Start     umaze: the robot's cell, as in the task itself. All others: any free cell (D4RL's
              "multistart").
    Diverse   Nearly all targets are any cell (D4RL's "multigoal"); rewards remain those of the
              task's own goal.
    End       A few steps after touching the goal: hovering there would fill the data with
              terminals. Or at the task's episode limit, or soon after an ant has fallen on its back
              or is stuck. Always by timeout, as in D4RL.

How the recipe was tuned
    By hand, on pictures of the evaluated paths, with single runs of 10,000 to 40,000 updates at a
    learning rate of 1e-3 decaying to 0, 50 episodes, on 200,000 to 1,000,000 transitions, and on an
    ant 4 % heavier than D4RL's. The runs were not kept: the scores are hints, ±7 % each.

    A clone takes its heading from its own velocity more than from its position. Once beside the
    path it goes on into the wall and stays there. `lookahead` makes the data show the way back.
    Cloning then reached 54 % at 30,000 updates without straying (wander 0.3), and 32 % at 40,000
    with it (wander 0.5).

    Without straying the data do not show the walls, and Q valued being pressed against one as much
    as walking beside it: Diffusion-QL had 10, 38 and 24 % after 20,000 updates (three seeds, wander
    0.65). With the straying steps removed from the data, leaving only the way back, it had 22 %
    after 10,000; with all of them in the data 40 %, and 26 % at 15,000. So they stayed in.

    `linger` then set the share of terminals: 1.07 % at 3, where D4RL's umaze-v0 has about 1 %.

What a row means
    rewards[i] = 1 and terminals[i] = True if the state *after* actions[i] is within 0.5 m of the
    goal, as in the task's own step. So (s_i, a_i, r_i, s_{i+1}, done_i) is a transition of the
    environment used for evaluation. timeouts[i] marks a trajectory's last step, whose next state is
    not stored.
"""

from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from .antmaze import (
    CELL,
    MAZES,
    AntBatch,
    AntMaze,
    at_goal,
    cell_xy,
    free_cells,
    marked_cells,
    sample_goals,
)
from .walker import walk

VERSION = 3  # part of the cached file's name: raise it when the same seed would give other data
MAX_ANTS = 512  # simulated at once: enough to hide numpy's overhead behind the physics


@dataclass(frozen=True)
class Recipe:
    """What makes the data diverse and suboptimal, so that cloning them is not enough."""

    # σ of a trajectory's action noise ~ U: no two trajectories are equally good at walking.
    noise: tuple[float, float] = (0.1, 0.3)
    # Share of targets that are any cell instead of the goal's, drawn on each arrival. A clone
    # wanders as much; a Q-function learns which moves pay.
    wander: float = 0.5
    wander_diverse: float = 0.85
    # U(±) metres per axis: spreads the paths over the corridors, where an ant has a metre on each
    # side.
    waypoint_jitter: float = 0.4
    # Metres: a waypoint counts as no further away than this along each axis. A cell is 4 m, so an
    # ant beside its path comes back to it early, and the data show how.
    lookahead: float = 1.5
    # Mean number of steps until an ant strays in a random direction, and for how many steps it
    # does: usually into a wall. So the data show what pressing against a wall is worth.
    stray_every: float = 120
    stray: tuple[int, int] = (10, 40)
    # Steps a trajectory goes on after touching its goal; each that ends within 0.5 m is a terminal.
    linger: int = 3
    # Steps on the back or within a circle of 1 m before a trajectory ends. Some fallen ants belong
    # in the data, since a policy meets such states too, but not for hundreds of steps each.
    patience: int = 60


class Planner:
    """Shortest paths over one maze's cells, which are numbered row by row."""

    def __init__(self, maze: str):
        rows = MAZES[maze]
        self.shape = (len(rows), len(rows[0]))
        self.origin = np.array(cell_xy(maze, 0, 0))
        self.free = np.array([self.number(row, col) for row, col in free_cells(maze)])
        self.goal_cell = self.number(*marked_cells(maze, "G")[0])
        self.centers = np.array([cell_xy(maze, row, col) for row, col in np.ndindex(self.shape)])
        self.next_cell = np.stack([self._search(cell) for cell in range(len(self.centers))])

    def number(self, row: int, col: int) -> int:
        return int(row) * self.shape[1] + int(col)

    def cell(self, xy: np.ndarray) -> np.ndarray:
        """Cell numbers (n,) of positions (n, 2). Walls are centred on cells, hence the rounding."""
        n_rows, n_cols = self.shape
        col, row = np.rint((xy - self.origin) / CELL).astype(int).T
        return np.clip(row, 0, n_rows - 1) * n_cols + np.clip(col, 0, n_cols - 1)

    def _search(self, target: int) -> np.ndarray:
        """For each cell, (cells,), the next one on the way to target.

        For a wall it is a free neighbour, if there is one, else the wall itself.
        """
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
        n_rows, n_cols = self.shape
        row, col = divmod(cell, n_cols)
        around = [(row, col - 1), (row, col + 1), (row - 1, col), (row + 1, col)]
        return [self.number(r, c) for r, c in around if 0 <= r < n_rows and 0 <= c < n_cols]


class Herd:
    """How n ants decide where to walk. AntBatch holds their physics."""

    def __init__(self, task: AntMaze, n: int, rng: np.random.Generator, recipe: Recipe):
        self.task, self.rng, self.recipe = task, rng, recipe
        self.planner = Planner(task.maze)
        self.goals = np.zeros((n, 2))
        self.targets = np.zeros((n, 2))
        self.waypoints = np.zeros((n, *self.planner.centers.shape))
        self.noise = np.zeros((n, 1))
        self.anchor = np.zeros((n, 2))  # where it was when it last had moved by a metre
        self.idle = np.zeros(n, int)  # steps since it moved by a metre, upright
        self.touched = np.zeros(n, bool)  # the goal
        self.lingered = np.zeros(n, int)  # steps since touching it
        self.straying = np.zeros(n, int)  # steps that remain
        self.astray = np.zeros((n, 2))  # in this direction

    def begin(self, who: np.ndarray) -> np.ndarray:
        """Start new trajectories for the ants with indices who (k,). -> where they start (k, 2)"""
        rng, recipe, planner = self.rng, self.recipe, self.planner
        self.goals[who] = sample_goals(self.task.maze, len(who), rng)
        jitter = recipe.waypoint_jitter * rng.uniform(-1, 1, (len(who), *planner.centers.shape))
        self.waypoints[who] = planner.centers + jitter
        self.noise[who] = rng.uniform(*recipe.noise, (len(who), 1))
        self.idle[who] = 0
        self.touched[who] = False
        self.lingered[who] = 0
        self.straying[who] = 0
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
        """Count down the steps of the ants that stray; some of the others begin to."""
        rng, n = self.rng, len(self.straying)
        begins = (self.straying == 0) & (rng.random(n) < 1 / self.recipe.stray_every)
        angle = rng.uniform(0, 2 * np.pi, n)
        self.astray[begins] = np.stack([np.cos(angle), np.sin(angle)], axis=1)[begins]
        duration = rng.integers(*self.recipe.stray, n, endpoint=True)
        self.straying = np.where(begins, duration, np.maximum(self.straying - 1, 0))

    def arrive(self, qpos: np.ndarray, touched: np.ndarray) -> np.ndarray:
        """Give new targets to the ants that arrived. -> whose trajectory is over (n,)

        qpos (n, 15) is after the step, touched (n,) whether that ended at the goal.
        """
        xy = qpos[:, :2]
        self.touched |= touched
        self.lingered += self.touched
        self.aim(np.flatnonzero(at_goal(xy, self.targets)))
        # Whether the torso's own z axis points up.
        upright = 1 - 2 * (qpos[:, 4] ** 2 + qpos[:, 5] ** 2) > 0
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
    """The arrays of the HDF5 file by key.

    Each ant walks the same number of steps; its trajectories follow one another.
    """
    n = min(MAX_ANTS, -(-n_transitions // task.episode_limit))
    n_steps = -(-n_transitions // n)
    rng = np.random.default_rng(seed)
    herd = Herd(task, n, rng, recipe)
    widths = {"observations": 29, "actions": 8, "infos/goal": 2}
    data = {key: np.zeros((n, n_steps, width), np.float32) for key, width in widths.items()}
    data |= {"terminals": np.zeros((n, n_steps), bool), "timeouts": np.zeros((n, n_steps), bool)}
    age = np.zeros(n, int)
    # disable=None: no progress bar where the output is not a terminal.
    progress = tqdm(total=n * n_steps, unit=" transitions", disable=None)
    with AntBatch(task.maze, n, n_threads) as ants, progress:
        begin(herd, ants, np.arange(n))
        for t in range(n_steps):
            data["observations"][:, t] = ants.observations
            data["infos/goal"][:, t] = herd.goals
            data["actions"][:, t] = herd.actions(ants.qpos, ants.qvel)
            ants.step(data["actions"][:, t])
            # In float32, as the next observation is stored: rewards can be checked to the last bit.
            touched = at_goal(ants.qpos[:, :2].astype(np.float32), data["infos/goal"][:, t])
            gave_up = herd.arrive(ants.qpos, touched)
            age += 1
            over = gave_up | (age >= task.episode_limit) | (t == n_steps - 1)
            data["terminals"][:, t] = touched
            data["timeouts"][:, t] = over
            begin(herd, ants, np.flatnonzero(over))
            age[over] = 0
            progress.update(n)
    data = {key: array.reshape(-1, *array.shape[2:])[:n_transitions] for key, array in data.items()}
    data["timeouts"][-1] = True
    data["rewards"] = data["terminals"].astype(np.float32)
    data["infos/qpos"] = data["observations"][:, :15]
    data["infos/qvel"] = data["observations"][:, 15:]
    return data


def begin(herd: Herd, ants: AntBatch, who: np.ndarray) -> None:
    """Put the ants with the indices who (k,) at the start of new trajectories."""
    ants.reset(who, herd.rng)
    ants.qpos[who, :2] += herd.begin(who)


def statistics(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Size, episodes, returns, terminals and lengths of a generated data set.

    A trajectory's return is the sum of the rewards of all its visits to the goal.
    """
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

"""What all tasks share: limits and scores, evaluation of many episodes at once, data, errors.

Task, World, Episodes       a task, episodes of it side by side, and what an evaluation returns
Dataset, finite, in_box     transitions for Q-learning, and the checks of their numbers
TaskError                   raised for every kind of bad input
"""

import errno
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from atomic import written_whole

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)  # where it helps to free some space
ACTION_SLACK = 1e-3  # how far outside [-1, 1] an action in a data set may lie


class TaskError(RuntimeError):
    """Bad input to a task or its data. The message is one line: what is wrong and what to do."""


def one_line(text: object) -> str:
    """Text from outside, such as another library's message or a file's name, safe to print.

    Each run of white space becomes one blank. Each other character that cannot be printed, such as
    those of a terminal's escapes, becomes "?".
    """
    line = " ".join(str(text).split())
    return "".join(character if character.isprintable() else "?" for character in line)


def system_reason(error: OSError) -> str:
    """Why a file could not be read or written: h5py's own text holds much else."""
    return os.strerror(error.errno) if error.errno else one_line(error)


def readable(value: float) -> str:
    """A figure to be read: 1,000,000 or 3,245 or 252.9 or 0.01069."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:.4g}"


def expanded(path: str | os.PathLike, instead: str) -> Path:
    """The path with ~ replaced by the home directory.

    Raises TaskError, with what to do instead, where there is no home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise TaskError(f"there is no home directory for {one_line(path)}: {instead}") from error


# ---- Data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dataset:
    """Transitions (s, a, r, s', done) for Q-learning, and where they came from.

    Scores are quoted with `label`. `source` is its short form for file names. `reason` says in one
    line why this source was chosen.
    """

    task: str
    source: str  # "d4rl" | "generated" | "file" | "minari"
    label: str
    reason: str
    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32
    next_observations: np.ndarray  # (N, S) float32
    rewards: np.ndarray  # (N,) float32
    terminals: np.ndarray  # (N,) bool: the episode truly ended, so do not bootstrap from s'

    def __len__(self) -> int:
        return len(self.rewards)

    def fingerprint(self) -> dict:
        """Identifies the data: a resumed run must load the same, and scores are quoted with it."""
        crc = 0
        for column in (self.observations, self.actions, self.rewards, self.terminals):
            crc = zlib.crc32(column, crc)  # columns are contiguous: no copy
        return {
            "label": self.label,
            "source": self.source,
            "reason": self.reason,
            "n": len(self),
            "crc32": crc,
        }


def summary(rows: int, observations: np.ndarray, terminals: np.ndarray, returns: np.ndarray) -> str:
    """What was read, for the log.

    rows: how many the source has. observations (N, S) and terminals (N,) are those of the N
    transitions read from it, returns (E,) those of its episodes.
    """
    found = f"data: {len(observations):,} transitions of {rows:,} rows, {len(returns):,} episodes"
    mean, best = readable(float(returns.mean())), readable(float(returns.max()))
    found += f" of mean return {mean} and best {best}, {terminals.sum():,} terminals"
    blocks = np.array_split(observations, 1 + len(observations) // 10_000)
    empty = sum(np.sum(~block[block[:, 0] == 0].any(axis=1)) for block in blocks)
    return found + (f", {empty:,} observations of zeros only" if empty else "")


def finite(rows: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """The rows as float32.

    Raises TaskError if a value is not finite. The message names `where` and the row's number,
    counted from `first`.
    """
    # A float64 beyond float32's range becomes inf and is reported as such.
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32, copy=False)
    good = np.isfinite(rows)
    if not good.all():
        place = tuple(np.argwhere(~good)[0])
        found = f"{where} has {rows[place]} in row {first + place[0]}"
        raise TaskError(f"{found}; repair the data or use others")
    return rows


def in_box(actions: np.ndarray, where: str, first: int = 0) -> np.ndarray:
    """The actions as float32, checked by finite().

    Also raises TaskError if an action lies more than ACTION_SLACK outside [-1, 1].
    """
    actions = finite(actions, where, first)
    outside = np.abs(actions) > 1 + ACTION_SLACK
    if outside.any():
        row, column = np.argwhere(outside)[0]
        value = f"{actions[row, column]:.4g} in row {first + row}"
        raise TaskError(f"{where} has {value}, outside [-1, 1]; scale the actions to that box")
    return actions


# ---- Episodes and tasks --------------------------------------------------------------------------


class World:
    """n episodes of a task side by side. A context manager.

    `simulation`, a tasks.simulation.Simulation, holds their physics. All randomness is drawn from
    the rng that is passed in.
    """

    simulation = None
    observations: np.ndarray  # (n, S) float64

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        """Start new episodes for the indices who (k,)."""
        raise NotImplementedError

    def place(
        self, who: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Put the episodes who (k,) into states qpos (k, nq) and qvel (k, nv), or one for all."""
        self.simulation.place(who, qpos, qvel)

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """One environment step with actions (k, A), which are clipped to [-1, 1].

        -> rewards (k,), whether each episode is terminated (k,). Raises TaskError if the actions
        are not finite or have another shape.
        """
        raise NotImplementedError

    def posed(self):
        """mujoco.MjData of the first episode, for a picture that shows its goal, if any."""
        return self.simulation.posed(0)

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_) -> None:
        self.simulation.close()


@dataclass(frozen=True)
class Episodes:
    """The N episodes of one evaluation."""

    returns: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,) environment steps
    terminated: np.ndarray  # (N,) bool; False: stopped at the episode limit
    rewards: list[np.ndarray]  # N arrays (length,)


@dataclass(frozen=True)
class Task:
    """One of D4RL's tasks. A plain value; tasks.get(name) returns one.

    Raises TaskError if the reference scores are not finite or not ref_min < ref_max.
    """

    name: str  # "hopper-medium-v2"
    dataset_file: str  # path below D4RL's base URL
    state_dim: int
    action_dim: int
    episode_limit: int  # environment steps
    ref_min: float  # return of a random policy, by D4RL
    ref_max: float  # return of an expert, by D4RL
    max_action: ClassVar[float] = 1.0
    family: ClassVar[str]  # "antmaze", "locomotion", "adroit", "kitchen"
    can_generate: ClassVar[bool] = False  # whether tasks.generate can make data for it
    step_seconds: ClassVar[float]  # simulated time of one environment step

    def __post_init__(self):
        # NaN fails this too: some of D4RL's own tasks have it.
        if not -np.inf < self.ref_min < self.ref_max < np.inf:
            what = f"{self.name} has no reference scores ({self.ref_min}, {self.ref_max})"
            raise TaskError(f"{what}: its returns cannot be normalised")

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        """D4RL's score: 0 for ref_min to 100 for ref_max."""
        return 100.0 * (np.asarray(returns) - self.ref_min) / (self.ref_max - self.ref_min)

    def world(self, n: int, n_threads: int | None = None) -> World:
        """n episodes to be stepped together, on n_threads (default: all cores)."""
        raise NotImplementedError

    def camera(self, model, aspect: float):
        """Where tasks.env looks at this task's model from, in pictures of width / height = aspect.

        -> a mujoco.MjvCamera
        """
        raise NotImplementedError

    def evaluate(
        self,
        act: Callable[[np.ndarray], np.ndarray],
        n_episodes: int,
        seed: int,
        n_threads: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Episodes:
        """Run n_episodes at once, with one call of act a step for all that still run.

        act maps the observations (k, S) float32 of k running episodes to actions (k, A) in [-1, 1].
        on_step(t, k), if given, is called after step t with the number k still running. The result
        depends on seed and act only.

        Raises TaskError if n_episodes is less than 1, or if actions are not finite or have another
        shape.
        """
        if n_episodes < 1:
            raise TaskError(f"an evaluation needs at least one episode, not {n_episodes}")
        rng = np.random.default_rng(seed)
        running = np.arange(n_episodes)
        rewards = np.zeros((self.episode_limit, n_episodes))
        lengths = np.full(n_episodes, self.episode_limit)
        terminated = np.zeros(n_episodes, bool)
        with self.world(n_episodes, n_threads) as world:
            world.reset(running, rng)
            for t in range(self.episode_limit):
                actions = act(world.observations[running].astype(np.float32))
                rewards[t, running], over = world.step(running, actions, rng)
                terminated[running[over]] = True
                lengths[running[over]] = t + 1
                running = running[~over]
                if on_step is not None:
                    on_step(t + 1, len(running))
                if not len(running):
                    break
        each = [rewards[:length, i].copy() for i, length in enumerate(lengths)]
        return self._finish(world, Episodes(rewards.sum(axis=0), lengths, terminated, each))

    def _finish(self, world: World, episodes: Episodes) -> Episodes:
        """For subclasses: add what else the world recorded about the episodes."""
        return episodes

    def draw(self, episodes: Episodes, path: str | Path, title: str) -> None:
        """Draw the episodes to a PNG file, atomically. Raises TaskError if it cannot be written."""
        try:
            with written_whole(path) as temporary:
                self._figure(episodes, title).savefig(temporary, dpi=120, format="png")
        except OSError as error:
            reason = error.strerror or error
            raise TaskError(f"cannot write the picture {one_line(path)}: {reason}") from error

    def _figure(self, episodes: Episodes, title: str):
        """-> a matplotlib.figure.Figure. matplotlib is imported only where something is drawn."""
        from .pictures import draw_returns

        return draw_returns(episodes, self.ref_max, title)

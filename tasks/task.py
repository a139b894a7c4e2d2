"""What every task has in common: its name, score and limits, the evaluation of many episodes at once, its data, its error."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from matplotlib.figure import Figure

from atomic import written_whole

LINE, END, EXPERT = "#0072b2", "#d55e00", "#555555"  # of the picture


class TaskError(RuntimeError):
    """Bad input to a task or its data. The message is one line: what is wrong and what to do about it."""


def one_line(text: object) -> str:
    """For a message: another library's text, its line ends and runs of blanks made single blanks."""
    return " ".join(str(text).split())


@dataclass(frozen=True)
class Dataset:
    """Transitions (s, a, r, s', done) for Q-learning, and where they came from.

    label is what a score trained on them is quoted for, source its short form for file names, and reason says in one
    line why this source was taken.
    """

    task: str
    source: str  # "d4rl" | "generated" | "file" | "minari"
    label: str
    reason: str
    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32
    next_observations: np.ndarray  # (N, S) float32
    rewards: np.ndarray  # (N,) float32
    terminals: (
        np.ndarray
    )  # (N,) bool: the episode truly ended here, so nothing is bootstrapped from next_observations

    def __len__(self) -> int:
        return len(self.rewards)

    def fingerprint(self) -> dict:
        """What a resumed run must find again, and what its scores are quoted for."""
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


class World:
    """n episodes of a task side by side. A context manager.

    simulation (tasks.simulation.Simulation) holds their physics. All randomness is drawn from the rng that is handed in.
    """

    simulation = None
    observations: np.ndarray  # (n, S) float64

    def reset(self, who: np.ndarray, rng: np.random.Generator) -> None:
        """Begin new episodes for those with the indices who (k,)."""
        raise NotImplementedError

    def place(
        self, who: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, rng: np.random.Generator
    ) -> None:
        """Put episodes into states: qpos (k, nq), qvel (k, nv), or one for all."""
        self.simulation.place(who, qpos, qvel)

    def step(
        self, who: np.ndarray, actions: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """One environment step with actions (k, A), clipped to [-1, 1]. -> rewards (k,), whether an episode is terminated (k,)

        Raises TaskError for actions that are not finite or of another shape.
        """
        raise NotImplementedError

    def show(self, model) -> None:
        """Change a copy of the model to show, in a picture, what else the first episode is about."""

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_) -> None:
        self.simulation.close()


@dataclass(frozen=True)
class Episodes:
    """Episodes of one evaluation: returns (N,), lengths (N,) in environment steps, whether each was terminated (N,), and each
    one's rewards (length,)."""

    returns: np.ndarray
    lengths: np.ndarray
    terminated: np.ndarray
    rewards: list[np.ndarray]


@dataclass(frozen=True)
class Task:
    """One of D4RL's tasks. A plain value; tasks.get(name) returns one."""

    name: str  # "hopper-medium-v2"
    dataset_file: str  # below D4RL's base URL
    state_dim: int
    action_dim: int
    episode_limit: int  # environment steps
    ref_min: float  # return of a random policy, by D4RL
    ref_max: float  # return of an expert, by D4RL
    max_action: ClassVar[float] = 1.0
    family: ClassVar[str]  # "antmaze", "locomotion", "adroit", "kitchen"
    can_generate: ClassVar[bool] = False  # whether data can be made here (tasks.generate)
    step_seconds: ClassVar[float]  # of simulated time in one environment step

    def __post_init__(self):
        if (
            not -np.inf < self.ref_min < self.ref_max < np.inf
        ):  # NaN, which some of D4RL's own tasks have, included
            raise TaskError(
                f"{self.name} has no reference scores ({self.ref_min}, {self.ref_max}): its returns cannot be normalised"
            )

    def normalized_score(self, returns: np.ndarray) -> np.ndarray:
        """D4RL's score: 0 for ref_min to 100 for ref_max."""
        return 100.0 * (np.asarray(returns) - self.ref_min) / (self.ref_max - self.ref_min)

    def world(self, n: int, n_threads: int | None = None) -> World:
        """n episodes to be stepped together, on n_threads (default: all cores)."""
        raise NotImplementedError

    def camera(self, model):
        """Where tasks.env films the task's model from."""
        raise NotImplementedError

    def evaluate(
        self,
        act: Callable[[np.ndarray], np.ndarray],
        n_episodes: int,
        seed: int,
        n_threads: int | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Episodes:
        """Run n_episodes at once, with one call of act for all of them each step.

        act maps the observations (k, S) float32 of k running episodes to actions (k, A) in [-1, 1];
        on_step(t, k), if given, is called after step t with the k that are left. seed and act determine all.

        Raises TaskError for actions that are not finite or of another shape, and for no episodes.
        """
        if n_episodes < 1:
            raise TaskError(f"an evaluation needs at least one episode, not {n_episodes}")
        rng, alive = np.random.default_rng(seed), np.arange(n_episodes)
        rewards, lengths = (
            np.zeros((self.episode_limit, n_episodes)),
            np.full(n_episodes, self.episode_limit),
        )
        terminated = np.zeros(n_episodes, bool)
        with self.world(n_episodes, n_threads) as world:
            world.reset(alive, rng)
            for t in range(self.episode_limit):
                rewards[t, alive], over = world.step(
                    alive, act(world.observations[alive].astype(np.float32)), rng
                )
                terminated[alive[over]], lengths[alive[over]] = True, t + 1
                alive = alive[~over]
                if on_step is not None:
                    on_step(t + 1, len(alive))
                if not len(alive):
                    break
        each = [rewards[:length, i].copy() for i, length in enumerate(lengths)]
        return self._finish(world, Episodes(rewards.sum(axis=0), lengths, terminated, each))

    def _finish(self, world: World, episodes: Episodes) -> Episodes:
        """The episodes, with whatever else this task's world has seen of them."""
        return episodes

    def draw(self, episodes: Episodes, path: str | Path, title: str) -> None:
        """Draw what the episodes did as a PNG file, atomically. Raises TaskError if it cannot be written."""
        try:
            with written_whole(path) as temporary:
                self._figure(episodes, title).savefig(temporary, dpi=120, format="png")
        except OSError as error:
            raise TaskError(
                f"cannot write the picture {path}: {error.strerror or error}"
            ) from error

    def _figure(self, episodes: Episodes, title: str) -> Figure:
        """Every episode's return so far, step by step, with a mark where it was terminated."""
        figure = Figure(figsize=(7.0, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="environment step", ylabel="return so far")
        faint = float(np.interp(len(episodes.rewards), [10, 100], [0.8, 0.35]))
        for rewards, over in zip(episodes.rewards, episodes.terminated):
            total = np.concatenate([[0.0], np.cumsum(rewards)])
            axes.plot(total, color=LINE, linewidth=1.0, alpha=faint)
            if over:
                axes.plot(
                    len(rewards),
                    total[-1],
                    "o",
                    color=END,
                    markersize=4,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                )
        ended = f"terminated: {int(episodes.terminated.sum())} of {len(episodes.returns)}"
        axes.plot([], [], "o", color=END, markersize=4, label=ended)
        if self.ref_max < 2 * max(
            episodes.returns.max(), 1e-9
        ):  # where it is near enough to leave room for the rest
            axes.axhline(
                self.ref_max, color=EXPERT, linewidth=0.8, linestyle="--", label="D4RL's expert"
            )
        axes.legend(frameon=False, loc="upper left")
        axes.set_title(
            title, fontsize=9
        )  # two lines, the second the data's name, must fit the width
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

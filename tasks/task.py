"""What every task has in common: its error, its data, and the episodes of an evaluation."""

import zlib
from dataclasses import dataclass

import numpy as np


class TaskError(RuntimeError):
    """Bad input to a task or its data. The message is one line: what is wrong and what to do about it."""


@dataclass(frozen=True)
class Dataset:
    """Transitions (s, a, r, s', done) for Q-learning, and where they came from.

    label is what a score trained on them is quoted for, source its short form for file names, and reason says in one
    line why this source was taken.
    """

    task: str
    source: str  # "d4rl" | "generated" | "file"
    label: str
    reason: str
    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32
    next_observations: np.ndarray  # (N, S) float32
    rewards: np.ndarray  # (N,) float32
    terminals: np.ndarray  # (N,) bool: the episode truly ended here, so nothing is bootstrapped from next_observations

    def __len__(self) -> int:
        return len(self.rewards)

    def fingerprint(self) -> dict:
        """What a resumed run must find again, and what its scores are quoted for."""
        crc = 0
        for column in (self.observations, self.actions, self.rewards, self.terminals):
            crc = zlib.crc32(column.tobytes(), crc)
        return {"label": self.label, "source": self.source, "reason": self.reason, "n": len(self), "crc32": crc}


@dataclass(frozen=True)
class Episodes:
    """Episodes of one evaluation: returns (N,), lengths (N,) in environment steps, and the walked paths."""

    returns: np.ndarray
    lengths: np.ndarray
    paths: list[np.ndarray]  # N arrays (length + 1, 2): x, y in metres, the starting point first
    goals: np.ndarray  # (N, 2)

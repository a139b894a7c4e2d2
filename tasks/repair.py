"""D4RL's antmaze files without their known defects: --repair-data, read_hdf5(..., repair=True).

Two things are wrong in D4RL's antmaze-v0 files:

- In medium-diverse and umaze-diverse the timeouts are out of step with the trajectories (D4RL's
  issues 77 and 146). Rows where one trajectory ends and another begins are read as steps of up to
  21 m, and rows in the middle of a trajectory are left out.
- In umaze-diverse only one row of each trajectory is rewarded and terminal. In the other files
  every row that ends within 0.5 m of the goal is (issue 199).
"""

from collections.abc import Callable

import h5py
import numpy as np

from .antmaze import GOAL_RADIUS
from .task import TaskError, finite

# How far an ant may move in one step of 0.1 s, in metres. In 190,000 simulated steps, of walking
# and of random full torque, none moved as far as 0.32.
MAX_STEP = 1.0
# How far a stored goal may be from the one the rewards were computed with, in metres.
ROUNDING = 1e-3


class RepairError(TaskError):
    """The data can be read but not repaired: they have no known defect, or lack infos/goal."""


def check_repairable(task, other_source: str = "") -> None:
    """Raises RepairError unless the data are an antmaze file.

    other_source: what to call data that are not a file in D4RL's layout.
    """
    if other_source or task.family != "antmaze":
        healthy = f"nothing is known to be broken in {other_source or task.name} data"
        raise RepairError(f"{healthy}, only in D4RL's antmaze files: leave out --repair-data")


def repaired(
    file: h5py.File, where: str, terminals: np.ndarray, cut: np.ndarray, log: Callable[[str], None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Which rows of an antmaze file are transitions, judged by the ant's path.

    where names the file in messages. terminals and cut, each (N,) bool, are its flags. Returns
        begins      (N-1,) bool: the row is a transition to the next one
        done        (N-1,) bool: its terminal flag
        ends        (N,) bool: the row is the last of its trajectory
        relabelled  whether done was recomputed; the rewards are then equal to it

    Successors: cut is not used. Row i+1 follows row i unless the torso moves more than MAX_STEP
    between them or infos/goal changes: D4RL's script draws a goal whenever it resets the ant, and
    only then. A row without a successor is left out, unless it is a terminal near its goal: that
    needs no successor. A reset to within MAX_STEP, with the same goal, goes unnoticed.

    Terminals and rewards: if the file's own terminals lie within 0.5 m of infos/goal, every row
    that ends there gets 1 and all others 0. If they do not, infos/goal is only where the ant that
    collected the data was sent, and the flags stay as they are: D4RL's relabelling script drew one
    goal for the whole file and did not store it, but it did check every row.

    Raises RepairError if there is no infos/goal, or if all terminals would be lost.
    """
    goals = file.get("infos/goal") if isinstance(file.get("infos"), h5py.Group) else None
    usable = isinstance(goals, h5py.Dataset) and goals.dtype.kind == "f"
    if not usable or goals.shape != (len(terminals), 2):
        lacks = f"{where} has no infos/goal, (N, 2)"
        raise RepairError(f"{lacks}: it cannot be repaired; leave out --repair-data")
    xy = finite(file["observations"][:, :2], f"{where}: observations")
    goal = finite(goals[:], f"{where}: infos/goal")
    follows = (_distance(xy[1:], xy[:-1]) <= MAX_STEP) & (goal[1:] == goal[:-1]).all(axis=1)
    near = _distance(xy[:-1], goal[:-1]) <= GOAL_RADIUS + MAX_STEP
    left = _distance(xy[1:], goal[:-1])  # to go, after the step
    marked, cut = terminals[:-1], cut[:-1]
    fits = np.where(follows, left <= GOAL_RADIUS + ROUNDING, near)
    relabel = bool(fits[marked & follows].all() and fits[marked].any())
    if relabel:
        done = np.where(follows, left <= GOAL_RADIUS, marked & near)
        how = "by infos/goal"
    else:
        done = marked & follows
        how = "as the file has them, for another goal than infos/goal"
    begins = follows | done
    if marked.any() and not done.any():
        why = "its terminals have no successors and are not at infos/goal"
        raise RepairError(f"{where} cannot be repaired, {why}; leave out --repair-data")
    rows = f"{np.sum(begins & cut):,} rows taken in spite of their timeouts"
    out = f"{np.sum(~begins & ~cut):,} more left out"
    ends = f"{np.sum(done):,} terminals {how}, where the file has {np.sum(marked):,}"
    log(f"data: repaired: {rows}, {out}; {ends}")
    return begins, done, np.append(~follows, True), relabel


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # to infinity, which is far
        return np.linalg.norm(a - b, axis=1)

"""Many copies of one MuJoCo model, stepped together on all cores.

    with Simulation(model, n=100) as copies:
        copies.place(np.arange(100), qpos, qvel)
        copies.step(np.arange(100), control, n_substeps=5)

Also what all tasks need around that: loading and compiling models, and checking actions.
"""

import copy
import os
import threading
import warnings
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np
from mujoco.rollout import Rollout

from .task import TaskError, one_line


class Simulation:
    """n copies of one model, each in a world of its own. A context manager.

    qpos (n, nq), qvel (n, nv) and states (n, nq + nv) = [qpos, qvel] are float64 views of the same
    memory: they follow every step, and writing to them moves a copy, as place() does.

    sensors (n, nsensordata) are as mj_step leaves them: computed before the last substep, not after
    it. So is everything that D4RL's environments read from MuJoCo other than qpos and qvel. place()
    computes them for the new state.

    The solver starts cold at each call of step(), so a step depends on qpos, qvel and control only.

    `model` is a copy of the one that was given: changing it changes this simulation only. A
    simulation can be copied and pickled. The first step starts the threads and close() ends them;
    a step after that starts them again.
    """

    def __init__(self, model: mujoco.MjModel, n: int, n_threads: int | None = None):
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
        if size != 1 + model.nq + model.nv:
            extra = size - 1 - model.nq - model.nv
            raise ValueError(f"a model with {extra} states beyond qpos and qvel is not supported")
        self.model = copy.copy(model)
        self.sensors = np.zeros((n, model.nsensordata))
        self._state = np.zeros((n, size))  # MuJoCo's order: time, qpos, qvel
        self._n_threads = min(n_threads or available_cores(), n)
        self._rollout: Rollout | None = None
        self._data: list[mujoco.MjData] = []  # of the threads
        self.place(np.arange(n), model.qpos0, np.zeros(model.nv))

    @property
    def qpos(self) -> np.ndarray:
        return self._state[:, 1 : 1 + self.model.nq]

    @property
    def qvel(self) -> np.ndarray:
        return self._state[:, 1 + self.model.nq :]

    @property
    def states(self) -> np.ndarray:
        return self._state[:, 1:]

    def place(self, who: np.ndarray, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put the copies who (k,) into states qpos (k, nq) and qvel (k, nv), or one for all."""
        self.qpos[who], self.qvel[who] = qpos, qvel
        if self.model.nsensordata:
            for i in who:
                self.sensors[i] = self.posed(i).sensordata

    def posed(self, i: int) -> mujoco.MjData:
        """All that MuJoCo derives from the state of copy i."""
        data = mujoco.MjData(self.model)
        data.qpos[:], data.qvel[:] = self.qpos[i], self.qvel[i]
        mujoco.mj_forward(self.model, data)
        return data

    def step(self, who: np.ndarray, control: np.ndarray, n_substeps: int) -> None:
        """Advance the copies who (k,) by n_substeps, each with its row of control (k, nu)."""
        if not len(who):
            return
        if self._rollout is None:
            self._rollout = start_threads(self._n_threads)
            self._data = [mujoco.MjData(self.model) for _ in range(max(1, self._rollout.nthread))]
        start = self._state[who]
        start[:, 0] = 0.0
        control = np.repeat(control[:, None], n_substeps, axis=1)
        states, sensors = self._rollout.rollout(self.model, self._data, start, control)
        self._state[who], self.sensors[who] = states[:, -1], sensors[:, -1]

    def close(self) -> None:
        if self._rollout is not None:
            self._rollout.close()
        self._rollout, self._data = None, []

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rollout": None, "_data": []}

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def start_threads(n: int) -> Rollout:
    """MuJoCo's pool of n threads, of fewer if the system refuses some, or of none: the caller's.

    The pool's constructor aborts the process, or hangs, if only some of its threads can start. So
    twice as many Python threads are tried first: those that have just ended may still count.
    """
    if n > 1:
        n = min(n, startable_threads(2 * n) // 2)
    try:
        return Rollout(nthread=n if n > 1 else 0)
    except RuntimeError:  # not even one thread
        return Rollout(nthread=0)


def startable_threads(n: int) -> int:
    """How many of n threads the system lets this process run at once."""
    done, threads = threading.Event(), []
    try:
        for _ in range(n):
            thread = threading.Thread(target=done.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError:  # "can't start new thread"
        pass
    finally:
        done.set()
        for thread in threads:
            thread.join()
    return len(threads)


def load_spec(package: str, xml: str) -> mujoco.MjSpec:
    """A model from an XML file inside an installed package, without importing the package.

    Raises TaskError if the package is missing.
    """
    found = find_spec(package)
    if found is None:
        what = f"the package {package.replace('_', '-')} is missing, and this task's model is in it"
        raise TaskError(f"{what}: pip install -r requirements.txt")
    return mujoco.MjSpec.from_file(str(Path(found.submodule_search_locations[0]) / xml))


# MuJoCo 3's ways to find contacts of convex shapes, and several for one pair. With both turned off
# it finds them as D4RL's did. The oldest versions that we allow have neither the flags nor, by
# default, the new ways.
NEW_COLLISIONS = ("mjDSBL_NATIVECCD", "mjDSBL_MULTICCD")


def compile_spec(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """The model as D4RL's MuJoCo, 2.1.0, would have it: its masses and its contacts.

    See restore_masses, NEW_COLLISIONS and margins_add.
    """
    with warnings.catch_warnings():
        # About an attribute in half_cheetah.xml: the user can do nothing about it.
        warnings.filterwarnings("ignore", message=".*settotalmass")
        model = spec.compile()
        restore_masses(model, spec)
    for name in NEW_COLLISIONS:
        model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, name, 0))
    if margins_add():
        model.geom_margin[:] *= 0.5
    return model


def restore_masses(model: mujoco.MjModel, spec: mujoco.MjSpec) -> None:
    """Give all bodies the mass, centre and inertia that they had before MuJoCo 2.1.3.

    Until then a capsule of radius r and half-length l counted as a cylinder of length 2l + r: mass
    m = ρπr²(2l + r), inertia mr²/2 about the axis and m(3r² + (2l + r)²)/12 across it. MuJoCo's
    changelog for 2.1.3 says so: its cylindrical part, extended at both ends by half the radius.

    So the numbers are taken from a second model, with such cylinders in place of the capsules.
    MuJoCo's compiler then does what it always does about masses and inertias that are given,
    groups of geoms that do not count, and a total mass that is prescribed.
    """
    cylinders = spec.copy()
    for geom in cylinders.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            lengthen(geom, geom.size[0] / 2)
            geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
    old = cylinders.compile()
    for name in ("body_mass", "body_ipos", "body_inertia", "body_iquat"):
        getattr(model, name)[:] = getattr(old, name)
    mujoco.mj_setConst(model, mujoco.MjData(model))


def lengthen(geom: mujoco.MjsGeom, by: float) -> None:
    """Move both ends of a capsule or cylinder outwards."""
    if np.isnan(geom.fromto[0]):
        geom.size[1] += by
    else:
        start, end = geom.fromto.reshape(2, 3)
        along = by * (end - start) / np.linalg.norm(end - start)
        geom.fromto = [*(start - along), *(end + along)]


@lru_cache(maxsize=1)
def margins_add() -> bool:
    """Whether this MuJoCo adds the contact margins of two geoms, as from 3.5 on.

    Older versions, D4RL's among them, take the maximum. Where margins add, halving them all
    restores the maximum for geoms of equal margin. Only the kitchen has others: its arm (margin 0)
    feels the furniture (1 mm) from half a millimetre on instead of one.

    Instead of reading a version number, this tries two spheres 0.15 apart with a margin of 0.1
    each: they touch only if margins add.
    """
    sphere = '<body pos="0 0 {}"><freejoint/><geom size="1" margin="0.1"/></body>'
    xml = f"<mujoco><worldbody>{sphere.format(0)}{sphere.format(2.15)}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return data.ncon > 0


def checked_actions(actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Actions as float64, clipped to [-1, 1] as D4RL does.

    Raises TaskError if they are not finite numbers or not of this shape.
    """
    return np.clip(checked_numbers("actions", actions, shape), -1.0, 1.0)


def checked_numbers(what: str, numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Anything that numpy can read, as float64.

    Raises TaskError, which calls it `what`, if these are not finite numbers or not of this shape.
    """
    try:
        numbers = np.asarray(numbers)
        numbers = numbers.astype(np.float64, casting="same_kind", copy=False)
    # The last is torch's, about a tensor that requires gradients.
    except (TypeError, ValueError, RuntimeError) as error:
        reason = one_line(error)
        raise TaskError(f"{what} are not real numbers that numpy can read: {reason}") from error
    if numbers.shape != shape:
        raise TaskError(f"{what} have shape {numbers.shape}; give them with shape {shape}")
    if not np.isfinite(numbers).all():
        raise TaskError(f"{what} hold NaN or infinity; check what made them")
    return numbers


def available_cores() -> int:
    """The cores this process may use: in a container they can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Any task as a gymnasium environment, with pictures and films of an episode.

    import gymnasium, tasks
    env = gymnasium.make("hopper-medium-v2", render_mode="rgb_array")

The mazes have an environment of their own: tasks.antmaze_env.
"""

import importlib
import os
import sys
import weakref
from ctypes.util import find_library
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

from atomic import written_whole

from . import get
from .simulation import checked_numbers
from .task import Task, TaskError, one_line

ONE = np.array([0])  # index of the only episode in a world of one


class TaskEnv(gymnasium.Env):
    """A tasks.task.World with one episode. gymnasium.make adds the step limit.

    Observation (S,) float64 and action (A,) in [-1, 1], clipped as D4RL does. Their contents are
    described in tasks.locomotion, tasks.adroit and tasks.kitchen. An action that is not finite or
    has another shape raises TaskError.

    `model` is MuJoCo's, of this environment only. Environments can be copied and pickled: the copy
    goes on as the original would have, and makes pictures of its own.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self, task: Task | str, render_mode: str | None = None, width: int = 480, height: int = 480
    ):
        check_render_mode(render_mode)
        self.task = get(task) if isinstance(task, str) else task
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": round(1 / self.task.step_seconds)}
        state_shape, action_shape = (self.task.state_dim,), (self.task.action_dim,)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, state_shape, np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, action_shape, np.float32)
        self.world = self.task.world(1, n_threads=1)
        self._is_reset = False
        self._picture_size = (width, height)
        self._camera: Camera | None = None

    @property
    def model(self) -> mujoco.MjModel:
        return self.world.simulation.model

    @property
    def ref_min_score(self) -> float:
        """The return of a random policy, by D4RL."""
        return self.task.ref_min

    @property
    def ref_max_score(self) -> float:
        """The return of an expert, by D4RL."""
        return self.task.ref_max

    def get_normalized_score(self, returns: np.ndarray) -> np.ndarray:
        """As D4RL's, a fraction: 0 for ref_min_score, 1 for ref_max_score.

        The scores that papers quote, and tasks' own, are 100 times as large.
        """
        low, high = self.ref_min_score, self.ref_max_score
        return (np.asarray(returns) - low) / (high - low)

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Begin an episode; there are no options. -> observation (S,), info"""
        super().reset(seed=seed)
        self._begin(seed is not None)
        self._is_reset = True
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._check_reset()
        action = checked_numbers("actions", action, self.action_space.shape)
        reward, terminated = self.world.step(ONE, action[None], self.np_random)
        return self._observation(), float(reward[0]), bool(terminated[0]), False, self._info()

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Put the simulation into a state, qpos (nq,) and qvel (nv,). -> the observation

        Goals and the like stay. Raises TaskError if the numbers are not finite or have another
        shape.
        """
        qpos = checked_numbers("qpos", qpos, (self.model.nq,))
        qvel = checked_numbers("qvel", qvel, (self.model.nv,))
        self.world.place(ONE, qpos, qvel, self.np_random)
        return self._observation()

    def render(self) -> np.ndarray | None:
        """(height, width, 3) uint8. Raises TaskError if OpenGL is not available."""
        if self.render_mode is None:
            return None
        self._check_reset()
        if self._camera is None:
            width, height = self._picture_size
            view = self.task.camera(self.model, width / height)
            self._camera = Camera(self.model, view, width, height)
        return self._camera.shoot(self.world.posed())

    def close(self) -> None:
        self.world.simulation.close()
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_camera": None}  # OpenGL's contexts cannot be copied

    def _begin(self, seeded: bool) -> None:
        """Start an episode. seeded: reset() was given a seed."""
        self.world.reset(ONE, self.np_random)

    def _observation(self) -> np.ndarray:
        return self.world.observations[0].copy()

    def _info(self) -> dict:
        return {}

    def _check_reset(self) -> None:
        if not self._is_reset:
            raise gymnasium.error.ResetNeeded("call reset() before step() and render()")


def check_render_mode(render_mode: str | None) -> None:
    """Raises TaskError for a mode that our environments do not have."""
    if render_mode not in (None, "rgb_array"):
        raise TaskError(f"cannot render as {render_mode!r}; use render_mode='rgb_array', or None")


def film(env: gymnasium.Env, act, path: str | os.PathLike, seed: int) -> float:
    """Film one episode as an animated GIF at twice its natural speed. -> its return

    env was made with render_mode="rgb_array", and is closed. act: observation (S,) float32 ->
    action (A,). Raises TaskError if OpenGL is not available, and before it films anything if path
    cannot be written or does not end in .gif.
    """
    import imageio.v3 as iio

    check_film(Path(path))
    speed = 2 * env.metadata["render_fps"]  # environment steps a second
    every = max(2, round(speed / 20))
    try:
        total, frames = play(env, act, seed, every)
    finally:
        env.close()
    milliseconds = round(1000 * every / speed)  # each frame is shown
    options = {"extension": ".gif", "duration": milliseconds, "loop": 0}
    gif = iio.imwrite("<bytes>", np.stack(frames), **options)
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(gif)
    except OSError as error:
        reason = error.strerror or error
        raise TaskError(f"cannot write the film {one_line(path)}: {reason}") from error
    return total


def play(env: gymnasium.Env, act, seed: int, every: int) -> tuple[float, list[np.ndarray]]:
    """One episode. -> its return; pictures of its start, of each `every`-th step and of its end"""
    observation, _ = env.reset(seed=seed)
    frames = [env.render()]
    total, t, done = 0.0, 0, False
    while not done:
        action = act(observation.astype(np.float32))
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        t += 1
        done = terminated or truncated
        if t % every == 0 or done:
            frames.append(env.render())
    return total, frames


def check_film(path: Path) -> None:
    """Raises TaskError if a film cannot be written to path."""
    refused = f"cannot write the film {one_line(path)}"
    if path.suffix.lower() != ".gif":
        raise TaskError(f"{refused}: films are GIF files; let its name end in .gif")
    if path.is_dir():
        raise TaskError(f"{refused}: it is a folder")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise TaskError(f"{refused}: make its folder, or choose another")


class Camera:
    """Offscreen pictures of a model.

    mujoco.Renderer is not used: it takes the OpenGL that was chosen when mujoco was imported. On a
    machine without a display that one cannot work unless MUJOCO_GL was set beforehand.

    Raises TaskError, with what to install, if OpenGL is not available.
    """

    def __init__(self, model: mujoco.MjModel, view: mujoco.MjvCamera, width: int, height: int):
        buffer, quality = model.vis.global_, model.vis.quality
        buffer.offwidth = max(buffer.offwidth, width)
        buffer.offheight = max(buffer.offheight, height)
        # Without a GPU, a picture at the quality that the kitchen asks for takes seconds.
        quality.shadowsize = min(quality.shadowsize, 1024)
        quality.offsamples = min(quality.offsamples, 4)
        backend, gl = _gl_backend(), None
        try:
            gl = importlib.import_module(backend).GLContext(width, height)
            gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        # A missing or broken library raises any of these, depending on the backend.
        except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as error:
            if gl is not None:
                gl.free()
            what = f"cannot render with {backend} ({one_line(error)})"
            advice = "install libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
            raise TaskError(f"{what}; {advice}") from error
        self._gl = gl
        # Runs once, at the latest when the program ends: mujoco's own clean-up would fail then.
        self.close = weakref.finalize(self, _free, gl, self._context)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._model, self._view = model, view
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._viewport = mujoco.MjrRect(0, 0, width, height)

    def shoot(self, data: mujoco.MjData) -> np.ndarray:
        """(height, width, 3) uint8."""
        self._gl.make_current()
        option, everything = mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, option, None, self._view, everything, self._scene)
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest


def _free(gl, context: mujoco.MjrContext) -> None:
    gl.make_current()
    context.free()
    gl.free()


def _gl_backend() -> str:
    """The module that has OpenGL: MUJOCO_GL's, else GLFW on a display, else EGL, else OSMesa."""
    if sys.platform != "linux":
        return "mujoco"  # its GLContext is the right one there
    if os.environ.get("MUJOCO_GL"):
        return f"mujoco.{os.environ['MUJOCO_GL'].lower()}"
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "mujoco.glfw"
    return "mujoco.egl" if find_library("EGL") else "mujoco.osmesa"

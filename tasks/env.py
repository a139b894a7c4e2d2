"""Any task as a gymnasium environment, its pictures, and films of an episode. (The mazes have one of their own, antmaze_env.)

import gymnasium, tasks
env = gymnasium.make("hopper-medium-v2", render_mode="rgb_array")
"""

import copy
import importlib
import os
import sys
from ctypes.util import find_library

import gymnasium
import mujoco
import numpy as np

from atomic import written_whole

from .task import Task, TaskError

ONE = np.array([0])  # the only episode of a world of one


class TaskEnv(gymnasium.Env):
    """One episode of a task at a time: tasks.task.World for one. gymnasium.make adds the step limit.

    Observation (S,) float64 and action (A,) in [-1, 1], clipped as D4RL does, as in the task's file: tasks.locomotion,
    tasks.adroit, tasks.kitchen. An action that is not finite or of another shape raises TaskError.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self, task: Task, render_mode: str | None = None, width: int = 480, height: int = 480
    ):
        if render_mode not in (None, "rgb_array"):
            raise TaskError(
                f"cannot render as {render_mode!r}; use render_mode='rgb_array', or None"
            )
        self.task, self.world, self.render_mode = task, task.world(1, n_threads=1), render_mode
        self.metadata = {**self.metadata, "render_fps": round(1 / task.step_seconds)}
        self.observation_space = gymnasium.spaces.Box(
            -np.inf, np.inf, (task.state_dim,), np.float64
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (task.action_dim,), np.float32)
        self._picture_size = (width, height)
        self._camera: Camera | None = None

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.world.reset(ONE, self.np_random)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        reward, terminated = self.world.step(ONE, np.asarray(action)[None], self.np_random)
        return self._observation(), float(reward[0]), bool(terminated[0]), False, {}

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """Put the simulation into a state, qpos (nq,), qvel (nv,); what else an episode is about stays. -> observation"""
        self.world.place(ONE, qpos, qvel, self.np_random)
        return self._observation()

    def render(self) -> np.ndarray | None:
        """(height, width, 3) uint8. Raises TaskError where no OpenGL can be had."""
        if self.render_mode is None:
            return None
        simulation = self.world.simulation
        if self._camera is None:
            self._shown = copy.copy(
                simulation.model
            )  # pictures change it, and other worlds have the same one
            self._camera = Camera(self._shown, self.task.camera(self._shown), *self._picture_size)
        self.world.show(self._shown)
        data = mujoco.MjData(self._shown)
        data.qpos[:], data.qvel[:] = simulation.qpos[0], simulation.qvel[0]
        mujoco.mj_forward(self._shown, data)
        return self._camera.shoot(data)

    def close(self) -> None:
        self.world.simulation.close()
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _observation(self) -> np.ndarray:
        return self.world.observations[0].copy()


def film(env: gymnasium.Env, act, path: str | os.PathLike, seed: int) -> float:
    """One episode of an environment made with render_mode="rgb_array", as an animated GIF at twice its natural speed. -> its return

    act: observation (S,) float32 -> action (A,). Raises TaskError where there is no OpenGL or path cannot be written.
    """
    import imageio.v3 as iio

    speed = 2 * env.metadata["render_fps"]  # environment steps a second
    every = max(2, round(speed / 20))
    observation, _ = env.reset(seed=seed)
    frames, total, done, t = [env.render()], 0.0, False, 0
    while not done:
        observation, reward, terminated, truncated, _ = env.step(
            act(observation.astype(np.float32))
        )
        total, done, t = total + float(reward), terminated or truncated, t + 1
        if t % every == 0 or done:
            frames.append(env.render())
    env.close()
    gif = iio.imwrite(
        "<bytes>", np.stack(frames), extension=".gif", duration=round(1000 * every / speed), loop=0
    )
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(gif)
    except OSError as error:
        raise TaskError(f"cannot write the film {path}: {error.strerror or error}") from error
    return total


class Camera:
    """Offscreen pictures of a model.

    Not mujoco.Renderer, because that can only use the OpenGL chosen when mujoco was imported, which on a
    machine without a display is one that cannot work unless MUJOCO_GL was set beforehand.
    """

    def __init__(self, model: mujoco.MjModel, view: mujoco.MjvCamera, width: int, height: int):
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        quality = (
            model.vis.quality
        )  # the kitchen asks for what takes seconds a picture without a GPU
        quality.shadowsize, quality.offsamples = (
            min(quality.shadowsize, 1024),
            min(quality.offsamples, 4),
        )
        backend = _gl_backend()
        try:
            self._gl = importlib.import_module(backend).GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        # Which of these a missing or broken library shows as depends on the backend and on where it fails.
        except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as error:
            reason = " ".join(str(error).split())
            advice = "install libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
            raise TaskError(f"cannot render with {backend} ({reason}); {advice}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._model, self._view = model, view
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._viewport = mujoco.MjrRect(0, 0, width, height)

    def shoot(self, data: mujoco.MjData, *discs) -> np.ndarray:
        """(height, width, 3) uint8. discs: (centre (3,), radius, height, colour (4,)), drawn on top."""
        self._gl.make_current()
        option, everything = mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, option, None, self._view, everything, self._scene)
        for centre, radius, height, colour in discs:
            marker = self._scene.geoms[self._scene.ngeom]
            shape = mujoco.mjtGeom.mjGEOM_CYLINDER
            mujoco.mjv_initGeom(
                marker, shape, [radius, height, 0.0], centre, np.eye(3).ravel(), colour
            )
            self._scene.ngeom += 1
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _gl_backend() -> str:
    """The module to take OpenGL from: as MUJOCO_GL says; else GLFW on a display; else EGL, else OSMesa."""
    if sys.platform != "linux":
        return "mujoco"  # which has the one that is right there
    if os.environ.get("MUJOCO_GL"):
        return f"mujoco.{os.environ['MUJOCO_GL'].lower()}"
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "mujoco.glfw"
    return "mujoco.egl" if find_library("EGL") else "mujoco.osmesa"

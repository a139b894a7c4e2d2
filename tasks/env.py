"""Any task as a gymnasium environment, with pictures and films of an episode.

    import gymnasium, tasks
    env = gymnasium.make("hopper-medium-v2", render_mode="rgb_array")

The mazes have an environment of their own: tasks.antmaze_env.
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

from .task import Task, TaskError, one_line

ONE = np.array([0])  # index of the only episode in a world of one


class TaskEnv(gymnasium.Env):
    """A tasks.task.World with one episode. gymnasium.make adds the step limit.

    Observation (S,) float64 and action (A,) in [-1, 1], clipped as D4RL does. Their contents are
    described in tasks.locomotion, tasks.adroit and tasks.kitchen. An action that is not finite or
    has another shape raises TaskError.
    """

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(
        self, task: Task, render_mode: str | None = None, width: int = 480, height: int = 480
    ):
        check_render_mode(render_mode)
        self.task = task
        self.world = task.world(1, n_threads=1)
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "render_fps": round(1 / task.step_seconds)}
        state_shape, action_shape = (task.state_dim,), (task.action_dim,)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, state_shape, np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, action_shape, np.float32)
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
        """Put the simulation into a state, qpos (nq,) and qvel (nv,). -> the observation

        Goals and the like stay.
        """
        self.world.place(ONE, qpos, qvel, self.np_random)
        return self._observation()

    def render(self) -> np.ndarray | None:
        """(height, width, 3) uint8. Raises TaskError if OpenGL is not available."""
        if self.render_mode is None:
            return None
        simulation = self.world.simulation
        if self._camera is None:
            # A copy: pictures change the model, which is shared with other worlds.
            self._shown = copy.copy(simulation.model)
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


def check_render_mode(render_mode: str | None) -> None:
    """Raises TaskError for a mode that our environments do not have."""
    if render_mode not in (None, "rgb_array"):
        raise TaskError(f"cannot render as {render_mode!r}; use render_mode='rgb_array', or None")


def film(env: gymnasium.Env, act, path: str | os.PathLike, seed: int) -> float:
    """Film one episode as an animated GIF at twice its natural speed. -> its return

    env was made with render_mode="rgb_array". act: observation (S,) float32 -> action (A,). Raises
    TaskError if OpenGL is not available or path cannot be written.
    """
    import imageio.v3 as iio

    speed = 2 * env.metadata["render_fps"]  # environment steps a second
    every = max(2, round(speed / 20))
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
    env.close()
    milliseconds = round(1000 * every / speed)  # each frame is shown
    options = {"extension": ".gif", "duration": milliseconds, "loop": 0}
    gif = iio.imwrite("<bytes>", np.stack(frames), **options)
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(gif)
    except OSError as error:
        raise TaskError(f"cannot write the film {path}: {error.strerror or error}") from error
    return total


class Camera:
    """Offscreen pictures of a model.

    mujoco.Renderer is not used: it takes the OpenGL that was chosen when mujoco was imported. On a
    machine without a display that one cannot work unless MUJOCO_GL was set beforehand.

    Raises TaskError, with what to install, if OpenGL is not available.
    """

    def __init__(self, model: mujoco.MjModel, view: mujoco.MjvCamera, width: int, height: int):
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        # Without a GPU, a picture at the quality that the kitchen asks for takes seconds.
        quality = model.vis.quality
        quality.shadowsize = min(quality.shadowsize, 1024)
        quality.offsamples = min(quality.offsamples, 4)
        backend = _gl_backend()
        try:
            self._gl = importlib.import_module(backend).GLContext(width, height)
            self._gl.make_current()
            self._context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        # A missing or broken library raises any of these, depending on the backend.
        except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as error:
            what = f"cannot render with {backend} ({one_line(error)})"
            advice = "install libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
            raise TaskError(f"{what}; {advice}") from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._model, self._view = model, view
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._viewport = mujoco.MjrRect(0, 0, width, height)

    def shoot(self, data: mujoco.MjData, *discs) -> np.ndarray:
        """(height, width, 3) uint8.

        discs are drawn in addition, each (centre (3,), radius, height, colour (4,)).
        """
        self._gl.make_current()
        option, everything = mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, option, None, self._view, everything, self._scene)
        for centre, radius, height, colour in discs:
            marker = self._scene.geoms[self._scene.ngeom]
            shape, size = mujoco.mjtGeom.mjGEOM_CYLINDER, [radius, height, 0.0]
            mujoco.mjv_initGeom(marker, shape, size, centre, np.eye(3).ravel(), colour)
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
    """The module that has OpenGL: MUJOCO_GL's, else GLFW on a display, else EGL, else OSMesa."""
    if sys.platform != "linux":
        return "mujoco"  # its GLContext is the right one there
    if os.environ.get("MUJOCO_GL"):
        return f"mujoco.{os.environ['MUJOCO_GL'].lower()}"
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "mujoco.glfw"
    return "mujoco.egl" if find_library("EGL") else "mujoco.osmesa"

"""D4RL's antmaze-*-v0 as a gymnasium environment, pictures included.

    import gymnasium, tasks
    env = gymnasium.make("antmaze-umaze-v0", render_mode="rgb_array")
"""

import importlib
import os
import sys
from ctypes.util import find_library

import gymnasium
import mujoco
import numpy as np

from atomic import written_whole

from .antmaze import (
    ACTION_DIM,
    FRAME_SKIP,
    GOAL_RADIUS,
    STATE_DIM,
    TORQUE,
    at_goal,
    build_model,
    cell_xy,
    checked_actions,
    free_cells,
    sample_goals,
    sample_states,
)
from .task import TaskError

FLOOR_COLOUR = [0.92, 0.91, 0.88, 1.0]
WALL_COLOUR = [0.42, 0.52, 0.66, 1.0]
ANT_COLOUR = [0.85, 0.36, 0.10, 1.0]
GOAL_COLOUR = [0.15, 0.70, 0.30, 1.0]


class AntMazeEnv(gymnasium.Env):
    """An ant, a maze, and a goal the observation does not tell. gymnasium.make adds the step limit.

    Observation (29,) float64 = qpos (15) and qvel (14), metres, radians and seconds. Action (8,) in [-1, 1],
    for the joints hip 4, ankle 4, hip 1, ankle 1, hip 2, ankle 2, hip 3, ankle 3; values outside are clipped,
    as D4RL does, and an action that is not finite or not (8,) raises TaskError. Reward 1, and the end, when
    the torso is within 0.5 m of the goal, else 0. Falling over ends nothing.

    The goal is drawn at the first reset and stays, as D4RL v0's stays from the making of an environment on;
    only a reset that is given a seed draws it anew, so that seed and actions determine an episode. It is
    `goal`, and info["goal"].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self, maze: str = "umaze", render_mode: str | None = None, width: int = 640, height: int = 480
    ):
        if render_mode not in (None, "rgb_array"):
            raise TaskError(f"cannot render as {render_mode!r}; use render_mode='rgb_array', or None")
        self.maze = maze
        self.render_mode = render_mode
        self.model = build_model(maze)
        self.data = mujoco.MjData(self.model)
        self.goal: np.ndarray | None = None
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._picture_size = (width, height)
        self._camera: _MazeCamera | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.goal is None or seed is not None:
            self.goal = sample_goals(self.maze, 1, self.np_random)[0]
        qpos, qvel = sample_states(self.model, 1, self.np_random)
        self.set_state(qpos[0], qvel[0])
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.data.ctrl[:] = TORQUE * checked_actions(action, (ACTION_DIM,))
        self.data.qacc_warmstart[:] = 0.0  # as in AntBatch: observation and action decide, to the last bit
        mujoco.mj_step(self.model, self.data, FRAME_SKIP)
        success = bool(at_goal(self.data.qpos[:2], self.goal))
        return self._observation(), float(success), success, False, self._info()

    def set_state(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        """Put the ant into a state: qpos (15,), qvel (14,)."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = qpos
        self.data.qvel[:] = qvel
        mujoco.mj_forward(self.model, self.data)

    def render(self) -> np.ndarray | None:
        """The maze from above at an angle: (height, width, 3) uint8. TaskError where no OpenGL can be had."""
        if self.render_mode is None or self.goal is None:  # not asked for, or not reset yet
            return None
        if self._camera is None:
            self._camera = _MazeCamera(self.model, self.maze, *self._picture_size)
        return self._camera.shoot(self.data, self.goal)

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def _info(self) -> dict:
        return {"goal": self.goal.copy(), "success": bool(at_goal(self.data.qpos[:2], self.goal))}


def film(name: str, act, path: str | os.PathLike, seed: int) -> float:
    """One episode of the task `name` as an animated GIF, at twice its natural speed. -> its return

    act: observation (S,) float32 -> action (A,). Raises TaskError where there is no OpenGL or path cannot be written.
    """
    import imageio.v3 as iio

    env = gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True)
    observation, _ = env.reset(seed=seed)
    frames, total, done, t = [env.render()], 0.0, False, 0
    while not done:
        observation, reward, terminated, truncated, _ = env.step(act(observation.astype(np.float32)))
        total, done, t = total + float(reward), terminated or truncated, t + 1
        if t % 2 == 0 or done:
            frames.append(env.render())
    env.close()
    gif = iio.imwrite("<bytes>", np.stack(frames), extension=".gif", duration=100, loop=0)
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(gif)
    except OSError as error:
        raise TaskError(f"cannot write the film {path}: {error.strerror or error}") from error
    return total


# ------------------------------------------------------------------------------------------------------------
# Pictures


class _MazeCamera:
    """Offscreen pictures of the whole maze.

    Not mujoco.Renderer, because that can only use the OpenGL chosen when mujoco was imported, which on a
    machine without a display is one that cannot work unless MUJOCO_GL was set beforehand.
    """

    def __init__(self, model: mujoco.MjModel, maze: str, width: int, height: int):
        _paint(model)
        model.vis.global_.offwidth, model.vis.global_.offheight = width, height
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
        self._model = model
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._viewport = mujoco.MjrRect(0, 0, width, height)
        self._view = _view_of(maze, width / height)

    def shoot(self, data: mujoco.MjData, goal: np.ndarray) -> np.ndarray:
        self._gl.make_current()
        option, everything = mujoco.MjvOption(), mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, option, None, self._view, everything, self._scene)
        marker = self._scene.geoms[self._scene.ngeom]
        disc, size, place = mujoco.mjtGeom.mjGEOM_CYLINDER, [GOAL_RADIUS, 0.03, 0.0], [*goal, 0.03]
        mujoco.mjv_initGeom(marker, disc, size, place, np.eye(3).ravel(), GOAL_COLOUR)
        self._scene.ngeom += 1
        mujoco.mjr_render(self._viewport, self._scene, self._context)
        picture = np.empty((self._viewport.height, self._viewport.width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._viewport, self._context)
        return picture[::-1].copy()  # OpenGL's first row is the lowest

    def close(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()


def _paint(model: mujoco.MjModel) -> None:
    """Pale floor, blue walls, orange ant, light from above the camera's shoulder. No physics."""
    model.geom_matid[:] = -1
    model.geom_rgba[:] = ANT_COLOUR
    for geom in range(model.ngeom):
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX:
            model.geom_rgba[geom] = WALL_COLOUR
    floor = model.geom("floor").id
    model.geom_rgba[floor] = FLOOR_COLOUR
    model.geom_size[floor, :2] = 0.0  # drawn without end; gymnasium's 40 m are too few for the large maze
    headlight = model.vis.headlight
    headlight.ambient[:], headlight.diffuse[:], headlight.specular[:] = 0.45, 0.25, 0.0
    model.light_dir[0], model.light_diffuse[0], model.light_specular[0] = [0.4, 0.5, -1.0], 0.45, 0.0


def _view_of(maze: str, aspect: float) -> mujoco.MjvCamera:
    """A camera looking down at the middle of the maze, as far away as it takes to see all of it."""
    corners = np.array([cell_xy(maze, row, col) for row, col in free_cells(maze)])
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    width, depth = highest - lowest + 8.0  # the free cells and half a wall all round
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FREE
    view.lookat[:] = [*(lowest + highest) / 2, 0.0]
    view.azimuth, view.elevation = 90.0, -65.0
    view.distance = 1.5 * max(depth, width / aspect)
    return view


def _gl_backend() -> str:
    """The module to take OpenGL from: as MUJOCO_GL says; else GLFW on a display; else EGL, else OSMesa."""
    if sys.platform != "linux":
        return "mujoco"  # which has the one that is right there
    if os.environ.get("MUJOCO_GL"):
        return f"mujoco.{os.environ['MUJOCO_GL'].lower()}"
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "mujoco.glfw"
    return "mujoco.egl" if find_library("EGL") else "mujoco.osmesa"

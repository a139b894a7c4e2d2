"""D4RL's antmaze-*-v0 as a gymnasium environment, pictures included.

import gymnasium, tasks
env = gymnasium.make("antmaze-umaze-v0", render_mode="rgb_array")
"""

import gymnasium
import mujoco
import numpy as np

from .antmaze import (
    ACTION_DIM,
    FRAME_SKIP,
    GOAL_RADIUS,
    STATE_DIM,
    TORQUE,
    at_goal,
    build_model,
    cell_xy,
    free_cells,
    sample_goals,
    sample_states,
)
from .env import Camera, check_render_mode
from .simulation import checked_actions

FLOOR_COLOUR = [0.92, 0.91, 0.88, 1.0]
WALL_COLOUR = [0.42, 0.52, 0.66, 1.0]
ANT_COLOUR = [0.85, 0.36, 0.10, 1.0]
GOAL_COLOUR = [0.15, 0.70, 0.30, 1.0]


class AntMazeEnv(gymnasium.Env):
    """An ant, a maze, and a goal that is not observed. gymnasium.make adds the step limit.

    Observation (29,) float64: qpos (15) and qvel (14), in metres, radians and seconds. Action (8,)
    in [-1, 1], for the joints hip 4, ankle 4, hip 1, ankle 1, hip 2, ankle 2, hip 3, ankle 3.
    Values outside are clipped, as D4RL does; an action that is not finite or not (8,) raises
    TaskError. When the torso is within 0.5 m of the goal, the reward is 1 and the episode ends;
    else the reward is 0. Falling over does not end the episode.

    The goal is drawn at the first reset and then stays; in D4RL v0 it stays from the creation of an
    environment on. Only a reset with a seed draws it again, so that seed and actions determine an
    episode. It is `goal`, and info["goal"].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        maze: str = "umaze",
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ):
        check_render_mode(render_mode)
        self.maze = maze
        self.render_mode = render_mode
        self.model = build_model(maze)
        self.data = mujoco.MjData(self.model)
        self.goal: np.ndarray | None = None
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
        self._picture_size = (width, height)
        self._camera: Camera | None = None

    def reset(
        self, *, seed: int | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.goal is None or seed is not None:
            self.goal = sample_goals(self.maze, 1, self.np_random)[0]
        qpos, qvel = sample_states(self.model, 1, self.np_random)
        self.set_state(qpos[0], qvel[0])
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.data.ctrl[:] = TORQUE * checked_actions(action, (ACTION_DIM,))
        # Start the solver cold, as AntBatch does: a step depends on qpos, qvel and action only.
        self.data.qacc_warmstart[:] = 0.0
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
        """The maze from above at an angle: (height, width, 3) uint8, or None before a reset.

        Raises TaskError if OpenGL is not available.
        """
        if self.render_mode is None or self.goal is None:
            return None
        if self._camera is None:
            _paint(self.model)
            width, height = self._picture_size
            self._camera = Camera(self.model, _view_of(self.maze, width / height), width, height)
        goal = ([*self.goal, 0.03], GOAL_RADIUS, 0.03, GOAL_COLOUR)
        return self._camera.shoot(self.data, goal)

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.data.qpos, self.data.qvel])

    def _info(self) -> dict:
        return {"goal": self.goal.copy(), "success": bool(at_goal(self.data.qpos[:2], self.goal))}


# ---- Pictures ------------------------------------------------------------------------------------


def _paint(model: mujoco.MjModel) -> None:
    """Pale floor, blue walls, orange ant, light from behind the camera. Physics is unchanged."""
    model.geom_matid[:] = -1
    model.geom_rgba[:] = ANT_COLOUR
    for geom in range(model.ngeom):
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_BOX:
            model.geom_rgba[geom] = WALL_COLOUR
    floor = model.geom("floor").id
    model.geom_rgba[floor] = FLOOR_COLOUR
    model.geom_size[floor, :2] = 0.0  # infinite: gymnasium's 40 m do not cover the large maze
    headlight = model.vis.headlight
    headlight.ambient[:] = 0.45
    headlight.diffuse[:] = 0.25
    headlight.specular[:] = 0.0
    model.light_dir[0] = [0.4, 0.5, -1.0]
    model.light_diffuse[0] = 0.45
    model.light_specular[0] = 0.0


def _view_of(maze: str, aspect: float) -> mujoco.MjvCamera:
    """A camera looking down at the middle of the maze, far enough away to see all of it."""
    corners = np.array([cell_xy(maze, row, col) for row, col in free_cells(maze)])
    lowest, highest = corners.min(axis=0), corners.max(axis=0)
    width, depth = highest - lowest + 8.0  # the free cells and half a wall around them
    view = mujoco.MjvCamera()
    view.type = mujoco.mjtCamera.mjCAMERA_FREE
    view.lookat[:] = [*(lowest + highest) / 2, 0.0]
    view.azimuth, view.elevation = 90.0, -65.0
    view.distance = 1.5 * max(depth, width / aspect)
    return view

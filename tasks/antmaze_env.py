"""D4RL's antmaze-*-v0 as a gymnasium environment, pictures included.

import gymnasium, tasks
env = gymnasium.make("antmaze-umaze-v0", render_mode="rgb_array")
"""

import numpy as np

from .antmaze import AntMaze, at_goal
from .env import ONE, TaskEnv


class AntMazeEnv(TaskEnv):
    """An ant, a maze, and a goal that is not observed. gymnasium.make adds the step limit.

    Observation (29,) float64: qpos (15) and qvel (14), in metres, radians and seconds. Action (8,)
    in [-1, 1], for the joints hip 4, ankle 4, hip 1, ankle 1, hip 2, ankle 2, hip 3, ankle 3.
    Values outside are clipped, as D4RL does; an action that is not finite or not (8,) raises
    TaskError. When the torso is within 0.5 m of the goal, the reward is 1 and the episode ends;
    else the reward is 0. Falling over does not end the episode.

    The goal is drawn at the first reset and then stays; in D4RL v0 it stays from the creation of an
    environment on. Only a reset with a seed draws it again, so that seed and actions determine an
    episode. It is `goal`, a view that can be written to, NaN before the first reset; info["goal"]
    is a copy.
    """

    def __init__(
        self,
        task: AntMaze | str = "antmaze-umaze-v0",
        render_mode: str | None = None,
        width: int = 640,
        height: int = 480,
    ):
        super().__init__(task, render_mode, width, height)

    @property
    def goal(self) -> np.ndarray:
        return self.world.goals[0]

    @goal.setter
    def goal(self, xy: np.ndarray) -> None:
        self.world.goals[0] = xy

    def _begin(self, seeded: bool) -> None:
        if seeded or np.isnan(self.goal).any():
            self.world.reset(ONE, self.np_random)
        else:
            self.world.restart(ONE, self.np_random)

    def _info(self) -> dict:
        position = self.world.simulation.qpos[0, :2]
        return {"goal": self.goal.copy(), "success": bool(at_goal(position, self.goal))}

"""Record what one step of D4RL's locomotion, pen and kitchen environments does on MuJoCo 2.3.3.

    python -m venv old
    old/bin/pip install mujoco==2.3.3 gymnasium
    old/bin/pip install --no-deps gymnasium-robotics
    old/bin/python tests/data/make_tasks_mujoco233.py

2.3.3 is the oldest MuJoCo that installs on Python 3.11, and it combines contact margins as D4RL's
MuJoCo did. This is independent of tasks/: frame skips, controls and actuators are repeated here.

tasks_mujoco233.npz beside this file holds for each of hopper, halfcheetah, walker2d, pen and
kitchen: NAME/qpos (N, nq), NAME/qvel (N, nv), NAME/action (N, A) in [-1, 1], NAME/next_qpos and
NAME/next_qvel after a step with a cold start of the solver, and NAME/n_contacts (N,) after it; for
the pen also place (N, 3) and direction (N, 3) as they are in MjData after the step.
"""

from importlib.util import find_spec
from pathlib import Path

import mujoco
import numpy as np

WALKS, STEPS, EVERY = 8, 32, 4
GYM, ROBOTICS = (
    Path(find_spec(name).submodule_search_locations[0])
    for name in ("gymnasium", "gymnasium_robotics")
)
FILES = {
    "hopper": (GYM / "envs/mujoco/assets/hopper.xml", 4),
    "halfcheetah": (GYM / "envs/mujoco/assets/half_cheetah.xml", 5),
    "walker2d": (GYM / "envs/mujoco/assets/walker2d.xml", 4),
    "pen": (ROBOTICS / "envs/assets/adroit_hand/adroit_pen.xml", 5),
    "kitchen": (ROBOTICS / "envs/assets/kitchen_franka/kitchen_assets/kitchen_env_model.xml", 40),
}
# The arm's start and the controller's limits, from D4RL's kitchen. The noise of the joint angles
# that a command is added to is left out.
ARM = [
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394,
    0.0479267505, 0.0371350919,
]  # fmt: skip
LOW = [-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0]
HIGH = [2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04]


def load(name: str) -> mujoco.MjModel:
    model = mujoco.MjModel.from_xml_path(str(FILES[name][0]))
    if name == "pen":
        for i in range(model.nu):
            stiffness = 10.0 if model.actuator(i).name in ("A_WRJ1", "A_WRJ0") else 1.0
            if not model.actuator(i).name.startswith("A_AR"):
                model.actuator_gainprm[i, :3] = [stiffness, 0, 0]
                model.actuator_biasprm[i, :3] = [0, -stiffness, 0]
    return model


def begin(name: str, model: mujoco.MjModel, rng) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = model.qpos0.copy(), np.zeros(model.nv)
    if name == "kitchen":
        qpos = model.key_qpos[0].copy()
        qpos[:9] = ARM
    elif name != "pen":
        qpos += rng.uniform(-0.1, 0.1, model.nq)
        qvel = 0.3 * rng.standard_normal(model.nv)
    return qpos, qvel


def control(name: str, model: mujoco.MjModel, qpos: np.ndarray, action: np.ndarray) -> np.ndarray:
    if name == "pen":
        low, high = model.actuator_ctrlrange.T
        return (low + high) / 2 + action * (high - low) / 2
    if name == "kitchen":
        return np.clip(qpos[:9] + 2 * action * 0.08, LOW, HIGH)
    return action


def record(name: str, rng) -> dict[str, np.ndarray]:
    model, rows = load(name), []
    for _ in range(WALKS):
        qpos, qvel = begin(name, model, rng)
        held = rng.uniform(-1, 1, model.nu)
        for step in range(STEPS):
            # A random walk: it moves the body further than independent actions would.
            held = np.clip(held + rng.uniform(-0.5, 0.5, model.nu), -1, 1)
            data = mujoco.MjData(model)
            data.qpos[:], data.qvel[:] = qpos, qvel
            data.ctrl[:] = control(name, model, qpos, held)
            mujoco.mj_step(model, data, FILES[name][1])
            row = {
                "qpos": qpos,
                "qvel": qvel,
                "action": held,
                "next_qpos": data.qpos.copy(),
                "next_qvel": data.qvel.copy(),
                "n_contacts": data.ncon,
            }
            if name == "pen":
                top, bottom = data.site("object_top").xpos, data.site("object_bottom").xpos
                row |= {
                    "place": data.body("Object").xpos.copy(),
                    "direction": (top - bottom) / np.linalg.norm(top - bottom),
                }
            if step % EVERY == EVERY - 1:
                rows.append(row)
            qpos, qvel = data.qpos.copy(), data.qvel.copy()
    return {f"{name}/{key}": np.array([row[key] for row in rows]) for key in rows[0]}


def main() -> None:
    version = mujoco.__version__
    assert version == "2.3.3", f"this is MuJoCo {version}, the reference is 2.3.3"
    columns = {}
    for name in FILES:
        columns |= record(name, np.random.default_rng(0))
        contacts = columns[f"{name}/n_contacts"]
        print(f"{name}: {len(contacts)} steps, {(contacts > 0).sum()} end in contact")
    np.savez_compressed(Path(__file__).with_name("tasks_mujoco233.npz"), **columns)


if __name__ == "__main__":
    main()

"""Record what one environment step of D4RL's umaze ant does on MuJoCo 2.3.3.

    python -m venv old && old/bin/pip install mujoco==2.3.3 gymnasium
    old/bin/python tests/data/make_ant_mujoco233.py

2.3.3 is the oldest MuJoCo that installs on Python 3.11, and it combines contact margins as D4RL's
MuJoCo did. It has no MjSpec, so the model is made by editing the XML of gymnasium's ant,
independently of tasks.antmaze.build_model.

ant_mujoco233.npz beside this file holds qpos (N, 15), qvel (N, 14), action (N, 8) in [-1, 1],
next_qpos and next_qvel after 5 steps of 0.02 s from a cold start of the solver, and n_contacts (N,)
and n_wall_contacts (N,) after them.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import gymnasium
import mujoco
import numpy as np

UMAZE = ["11111", "1R001", "11101", "1G001", "11111"]
N_WALKS, WALK_LENGTH = 12, 30
RECORD_EVERY = 7  # steps of a walk: in the air at first, then on the floor, then against walls


def model() -> mujoco.MjModel:
    xml = Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"
    root = ElementTree.parse(xml).getroot()
    root.find("option").set("timestep", "0.02")
    root.find("default/geom").set("solimp", "0.8 0.8 0.01")
    for motor in root.iter("motor"):
        motor.set("gear", "1")
        motor.set("ctrlrange", "-30 30")
    world = root.find("worldbody")
    for row, marks in enumerate(UMAZE):
        for col, mark in enumerate(marks):
            if mark == "1":
                place = f"{4 * (col - 1)} {4 * (row - 1)} 1"
                wall = dict(type="box", pos=place, size="2 2 1", contype="1", conaffinity="1")
                ElementTree.SubElement(world, "geom", wall, name=f"wall_{row}_{col}")
    return mujoco.MjModel.from_xml_string(ElementTree.tostring(root, encoding="unicode"))


def main() -> None:
    version = mujoco.__version__
    assert version == "2.3.3", f"this is MuJoCo {version}, the reference is 2.3.3"
    ant = model()
    rng = np.random.default_rng(0)
    rows = []
    is_wall = np.array([ant.geom(i).name.startswith("wall") for i in range(ant.ngeom)])
    for walk in range(N_WALKS):
        qpos, qvel = ant.qpos0.copy(), 0.1 * rng.standard_normal(14)
        qpos += rng.uniform(-0.1, 0.1, 15)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
        if walk % 2:
            qpos[:2] += [8.0 + rng.choice([-1.1, 1.1]), 4.0]  # where its feet just touch a wall
        for step in range(WALK_LENGTH):
            data = mujoco.MjData(ant)
            data.qpos[:], data.qvel[:] = qpos, qvel
            action = rng.uniform(-1.0, 1.0, 8)
            data.ctrl[:] = 30.0 * action
            mujoco.mj_step(ant, data, 5)
            if step % RECORD_EVERY == 0:
                n_walls = sum(bool(is_wall[c.geom1] or is_wall[c.geom2]) for c in data.contact)
                after = data.qpos.copy(), data.qvel.copy()
                rows.append((qpos, qvel, action, *after, data.ncon, n_walls))
            qpos, qvel = data.qpos.copy(), data.qvel.copy()
    names = ("qpos", "qvel", "action", "next_qpos", "next_qvel", "n_contacts", "n_wall_contacts")
    columns = {name: np.array(column) for name, column in zip(names, zip(*rows))}
    np.savez_compressed(Path(__file__).with_name("ant_mujoco233.npz"), **columns)
    touching, walls = (columns[name] > 0 for name in ("n_contacts", "n_wall_contacts"))
    print(f"{len(rows)} steps, {touching.sum()} end in contact, {walls.sum()} with a wall")


if __name__ == "__main__":
    main()

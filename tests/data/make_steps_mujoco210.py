"""Record what one step of D4RL's tasks does on MuJoCo 2.1.0, the version that D4RL is made for.

    python -m venv old && old/bin/pip install numpy cffi
    old/bin/pip download --no-deps --ignore-requires-python -d DOWNLOADS \
        free-mujoco-py==2.1.6 gym==0.23.1 d4rl==1.1
    old/bin/python tests/data/make_steps_mujoco210.py DOWNLOADS

The first package brings MuJoCo 2.1.0's library and headers, the other two the models. This is
independent of tasks/: models, controls, observations and rewards are made here, as gym's and D4RL's
environments make them. The library is called through its C interface.

steps_mujoco210.npz beside this file holds for each of hopper, halfcheetah, walker2d, ant (in D4RL's
umaze), pen and kitchen, with N = 64 steps from states of random walks:

    NAME/qpos (N, nq), qvel (N, nv), action (N, A)    before the step; actions are in [-1, 1]
    NAME/next_qpos, next_qvel, n_contacts (N,)        after it, from a cold start of the solver
    NAME/next_obs (N, S), reward (N,), done (N,)      likewise; the kitchen's without noise, goals
    NAME/body_mass (B,), body_ipos (B, 3), body_inertia (B, 3), body_iquat (B, 4)     of all bodies
    pen/wanted (N, 3), ant/wanted (N, 2)              the pen's direction and the ant's goal
"""

import re
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from pathlib import Path

import cffi
import numpy as np

WALKS, STEPS, EVERY = 8, 32, 4
UMAZE = ["11111", "1R001", "11101", "1G001", "11111"]
GYM, LIBRARY = "gym-0.23.1/gym/envs/mujoco/assets", "mujoco_py/binaries/linux/mujoco210"
FILES = {  # the model, and how often it is stepped in one step of the environment
    "hopper": (f"{GYM}/hopper.xml", 4),
    "halfcheetah": (f"{GYM}/half_cheetah.xml", 5),
    "walker2d": (f"{GYM}/walker2d.xml", 4),
    "ant": ("d4rl/locomotion/assets/ant.xml", 5),
    "pen": ("d4rl/hand_manipulation_suite/assets/DAPG_pen.xml", 5),
    "kitchen": ("d4rl/kitchen/adept_envs/franka/assets/franka_kitchen_jntpos_act_ab.xml", 40),
}
FUNCTIONS = """
mjModel* mj_loadXML(const char* path, const void* files, char* error, int error_size);
mjData* mj_makeData(const mjModel* m);
void mj_resetData(const mjModel* m, mjData* d);
void mj_step(const mjModel* m, mjData* d);
int mj_name2id(const mjModel* m, int type, const char* name);
int mj_version();
"""
BODY, SITE, ACTUATOR = 1, 6, 18  # of enum mjtObj
# The kitchen's qpos at the start, and the limits of its arm's controller.
KITCHEN = [
    0.148388023, -1.76848573, 1.84390296, -2.4768576, 0.260252026, 0.712533105, 1.59515394,
    0.0479267505, 0.0371350919, -2.6627985e-4, -5.18043486e-5, 3.12877220e-5, -4.51199853e-5,
    -3.90842156e-6, -4.22629655e-5, 6.28065475e-5, 4.04984708e-5, 4.62730939e-4, -2.26906415e-4,
    -4.65501369e-4, -6.44129196e-3, -1.77048263e-3, 1.08009684e-3, -0.269397440, 0.350383255,
    1.61944683, 1.00618764, 4.06395120e-3, -6.62095997e-3, -2.68278933e-4,
]  # fmt: skip
LOW = [-2.9, -1.8, -2.9, -3.1, -2.9, 0, -2.9, 0, 0]
HIGH = [2.9, 1.8, 2.9, 0, 2.9, 3.8, 2.9, 0.04, 0.04]


def unpack(downloads: Path, folder: Path) -> None:
    for name in ("free_mujoco_py-2.1.6*.whl", "d4rl-1.1*.whl"):
        zipfile.ZipFile(next(downloads.glob(name))).extractall(folder)
    tarfile.open(next(downloads.glob("gym-0.23.1.tar.gz"))).extractall(folder, filter="data")


def open_library(folder: Path):
    """-> cffi's interface with the structs of the headers, and the library."""
    ffi, headers = cffi.FFI(), ""
    for name in ("mjmodel.h", "mjdata.h"):
        text = (folder / "include" / name).read_text()
        text = text.replace("typedef float mjtNum;", "")  # mjtNum is double
        sizes = re.findall(r"^#define +mj\w+ +\d+\b", text, re.MULTILINE)
        headers += "\n".join([*sizes, re.sub(r"^ *#.*", "", text, flags=re.MULTILINE), ""])
    ffi.cdef(headers + FUNCTIONS)
    return ffi, ffi.dlopen(str(folder / "bin/libmujoco210nogl.so"))


class Simulation:
    """One model and its state. Arrays are views of MuJoCo's memory."""

    def __init__(self, ffi, library, path: Path, n_substeps: int):
        self.ffi, self.library, self.n_substeps = ffi, library, n_substeps
        error = ffi.new("char[1000]")
        self.m = library.mj_loadXML(str(path).encode(), ffi.NULL, error, 1000)
        if self.m == ffi.NULL:
            raise RuntimeError(ffi.string(error).decode())
        self.d = library.mj_makeData(self.m)
        self.nq, self.nv, self.nu = self.m.nq, self.m.nv, self.m.nu
        self.qpos0 = self.view(self.m.qpos0, self.nq)
        self.ctrlrange = self.view(self.m.actuator_ctrlrange, self.nu, 2)
        self.qpos, self.qvel = self.view(self.d.qpos, self.nq), self.view(self.d.qvel, self.nv)
        self.ctrl = self.view(self.d.ctrl, self.nu)
        self.seconds = self.m.opt.timestep * n_substeps

    def view(self, pointer, *shape: int) -> np.ndarray:
        n_bytes = 8 * int(np.prod(shape))
        return np.frombuffer(self.ffi.buffer(pointer, n_bytes), np.float64).reshape(shape)

    def index(self, kind: int, name: str) -> int:
        return self.library.mj_name2id(self.m, kind, name.encode())

    def place_of(self, kind: int, name: str) -> np.ndarray:
        """Of a body or site in the world, as the last substep computed it."""
        places = self.d.xpos if kind == BODY else self.d.site_xpos
        return self.view(places + 3 * self.index(kind, name), 3).copy()

    def step(self, qpos: np.ndarray, qvel: np.ndarray, ctrl: np.ndarray) -> None:
        self.library.mj_resetData(self.m, self.d)
        self.qpos[:], self.qvel[:], self.ctrl[:] = qpos, qvel, ctrl
        for _ in range(self.n_substeps):
            self.library.mj_step(self.m, self.d)

    def bodies(self) -> dict[str, np.ndarray]:
        widths = {"body_mass": (), "body_ipos": (3,), "body_inertia": (3,), "body_iquat": (4,)}
        n = self.m.nbody
        return {key: self.view(getattr(self.m, key), n, *w).copy() for key, w in widths.items()}


def add_walls(path: Path) -> Path:
    """-> the ant's model between the walls of the umaze, each 4 m wide and 2 m high"""
    tree = ElementTree.parse(path)
    for row, marks in enumerate(UMAZE):
        for col, mark in enumerate(marks):
            if mark == "1":
                place = f"{4 * (col - 1)} {4 * (row - 1)} 1"
                wall = dict(type="box", pos=place, size="2 2 1", contype="1", conaffinity="1")
                ElementTree.SubElement(tree.find("worldbody"), "geom", wall)
    tree.write(path.with_name("umaze.xml"))
    return path.with_name("umaze.xml")


def set_stiffness(pen: Simulation) -> None:
    gains, biases = (
        pen.view(pointer, pen.nu, 10)
        for pointer in (pen.m.actuator_gainprm, pen.m.actuator_biasprm)
    )
    for first, last, stiffness in (("A_WRJ1", "A_WRJ0", 10), ("A_FFJ3", "A_THJ0", 1)):
        chosen = slice(pen.index(ACTUATOR, first), pen.index(ACTUATOR, last) + 1)
        gains[chosen, :3] = [stiffness, 0, 0]
        biases[chosen, :3] = [0, -stiffness, 0]


def begin(name: str, simulation: Simulation, walk: int, rng) -> tuple[np.ndarray, np.ndarray]:
    qpos, qvel = simulation.qpos0.copy(), np.zeros(simulation.nv)
    if name == "kitchen":
        qpos = np.array(KITCHEN)
        qpos[22] -= 0.7 * (walk % 2)  # the microwave: closed or open
    elif name == "ant":
        qpos += rng.uniform(-0.1, 0.1, simulation.nq)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])
        if walk % 2:
            qpos[:2] += [8 + rng.choice([-1.1, 1.1]), 4]  # where its feet just touch a wall
    elif name != "pen":
        qpos += rng.uniform(-0.1, 0.1, simulation.nq)
        qpos[1] -= 0.1  # so that most feet touch the floor
        qvel = 0.3 * rng.standard_normal(simulation.nv)
    return qpos, qvel


def control(name: str, simulation: Simulation, qpos: np.ndarray, action: np.ndarray) -> np.ndarray:
    if name == "kitchen":
        return np.clip(qpos[:9] + 2 * action * 0.08, LOW, HIGH)
    low, high = simulation.ctrlrange.T  # ±1 in locomotion, ±30 for the ant
    return (low + high) / 2 + action * (high - low) / 2


def outcome(name: str, simulation: Simulation, x: float, action, wanted) -> tuple:
    """-> observation, reward and whether the episode ends, after a step that began at x"""
    qpos, qvel = simulation.qpos.copy(), simulation.qvel.copy()
    if name == "ant":
        reached = np.linalg.norm(qpos[:2] - wanted) <= 0.5
        return np.concatenate([qpos, qvel]), float(reached), reached
    if name == "kitchen":  # the microwave alone is asked for
        opened = abs(qpos[22] + 0.75) < 0.3
        return qpos, float(opened), opened
    if name == "pen":
        place, goal = simulation.place_of(BODY, "Object"), simulation.place_of(SITE, "eps_ball")
        top, bottom = (simulation.place_of(SITE, f"object_{end}") for end in ("top", "bottom"))
        direction = (top - bottom) / np.linalg.norm(top - bottom)
        distance, likeness = np.linalg.norm(place - goal), direction @ wanted
        near, dropped = distance < 0.075, place[2] < 0.075
        bonus = 10 * (near and likeness > 0.9) + 50 * (near and likeness > 0.95)
        parts = (qpos[:-6], place, qvel[-6:], direction, wanted, place - goal, direction - wanted)
        return np.concatenate(parts), likeness - distance + bonus - 5 * dropped, dropped
    speed, effort = (qpos[0] - x) / simulation.seconds, (action**2).sum()
    if name == "halfcheetah":
        return np.concatenate([qpos[1:], qvel]), speed - 0.1 * effort, False
    height, angle = qpos[1:3]
    if name == "walker2d":
        healthy = 0.8 < height < 2.0 and abs(angle) < 1.0
    else:
        bounded = np.abs(np.concatenate([qpos, qvel])[2:]).max() < 100
        healthy = bounded and height > 0.7 and abs(angle) < 0.2
    observation = np.concatenate([qpos[1:], qvel.clip(-10, 10)])
    return observation, speed + 1.0 - 1e-3 * effort, not healthy


def draw_wanted(name: str, qpos: np.ndarray, rng) -> np.ndarray:
    if name == "ant":
        return qpos[:2] + rng.uniform(-0.6, 0.6, 2)
    direction = rng.standard_normal(3)
    return direction / np.linalg.norm(direction)


def record(name: str, simulation: Simulation, rng) -> dict[str, np.ndarray]:
    rows = []
    for walk in range(WALKS):
        qpos, qvel = begin(name, simulation, walk, rng)
        held = rng.uniform(-1, 1, simulation.nu)
        for step in range(STEPS):
            # A random walk: it moves the body further than independent actions would.
            held = np.clip(held + rng.uniform(-0.5, 0.5, simulation.nu), -1, 1)
            wanted = draw_wanted(name, qpos, rng)
            simulation.step(qpos, qvel, control(name, simulation, qpos, held))
            observation, reward, done = outcome(name, simulation, qpos[0], held, wanted)
            row = {
                "qpos": qpos,
                "qvel": qvel,
                "action": held,
                "wanted": wanted,
                "next_qpos": simulation.qpos.copy(),
                "next_qvel": simulation.qvel.copy(),
                "n_contacts": simulation.d.ncon,
                "next_obs": observation,
                "reward": reward,
                "done": done,
            }
            if step % EVERY == EVERY - 1:
                rows.append(row)
            if done and walk % 2 and name != "kitchen":
                qpos, qvel = begin(name, simulation, walk, rng)
            else:
                qpos, qvel = simulation.qpos.copy(), simulation.qvel.copy()
    columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    bodies = simulation.bodies()
    if name == "kitchen":  # gymnasium-robotics' model lacks the first body, a mocap without a mass
        bodies = {key: np.delete(array, 1, axis=0) for key, array in bodies.items()}
    return {f"{name}/{key}": column for key, column in (columns | bodies).items()}


def main() -> None:
    columns = {}
    with tempfile.TemporaryDirectory() as folder:
        unpack(Path(sys.argv[1]), Path(folder))
        ffi, library = open_library(Path(folder) / LIBRARY)
        assert library.mj_version() == 210
        for name, (file, n_substeps) in FILES.items():
            path = Path(folder) / file
            path = add_walls(path) if name == "ant" else path
            simulation = Simulation(ffi, library, path, n_substeps)
            if name == "pen":
                set_stiffness(simulation)
            columns |= record(name, simulation, np.random.default_rng(0))
            contacts, done = (columns[f"{name}/{key}"] for key in ("n_contacts", "done"))
            print(
                f"{name}: {len(done)} steps, {(contacts > 0).sum()} in contact, {done.sum()} ends"
            )
    np.savez_compressed(Path(__file__).with_name("steps_mujoco210.npz"), **columns)


if __name__ == "__main__":
    main()

"""The paper's 2-D bandit: four ways of cloning data with four modes, four that also climb the reward; pictures and a table.

    python -m bench.bandit --quick                    # a rough picture in a minute on two cores
    python -m bench.bandit --compile                  # the paper's recipe, 100,000 updates a policy, three seeds: hours
    python -m bench.bandit --methods BC-MLE BC-Diffusion --seeds 2022
    python -m bench.bandit --fused                    # the same policies drawn by the fused sampler, on a GPU

Four corners of a square, σ = 0.05, are equally likely in the data; they pay 3.0, 0.0, 1.5 and 5.0 on average. There is one state.
Trained are the eight policies of bench/bandit_policies.py, and, always by the quick recipe, BC-Diffusion with 2 to 50 steps. The
data are the authors' own 10,000, the same for all; a policy's seed gives its weights, minibatches and noise. Which 10,000 they are
matters to the paper's recipe: by chance rewards have a slope within a corner, a critic learns it in 100,000 updates, and
Diffusion-QL climbs it. That recipe can also leave part of Diffusion-QL at the edge of the square, and where a seed ends is chance
(bandit_course.png); a line of its own shows it with critics that learn first. Every policy that is done is kept in runs/bandit, under the
whole configuration that made it: an interrupted command goes on from there, and commands that need the same policies share them
(after a change of how they train, empty that folder). Writes bandit.png, bandit_steps.png, bandit_course.png and bandit.json to
bench/results (--out); after --quick or --fused their names say so.

The table's figures are of 1,000 samples a seed, ± the standard deviation over seeds. A sample is a corner's if it lies within 3σ
of it, as 98.9 % of the data do, and then is worth that corner's mean reward. Outside all four it is worth nothing, as little as
at the worst corner: no data say what is paid there, and what Q promises there is not counted. The MMD to 1,000 other draws of
the data has the kernel exp(-‖x-y‖²/2h²), h = 0.1 = 2σ: it sees the corners' shares as well as their shape. Its floor is that of
two draws of the data, in the first line. CPU s is what training took of one core.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import kernels
from atomic import written_whole
from bench.bandit_policies import ACTION_DIM, CLIMBING, CLONING, METHODS, STATE_DIM, train
from bench.machine import describe
from bench.timing import RESULTS, has_compiler
from dql import Transitions
from run_folder import RunError, RunFolder, load_tensors, save_json, save_tensors

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "runs" / "bandit"

CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]])
NAMES = ("upper left", "lower left", "upper right", "lower right")
REWARDS = np.array([3.0, 0.0, 1.5, 5.0])
SIGMA, REWARD_SIGMA = 0.05, 0.5
N_DATA, DATA_SEED = 10_000, 2022
SAMPLES, SHOWN = 1000, 100  # evaluated; shown of a policy that climbs Q, as in the paper
STEPS = (2, 5, 10, 50)  # T in the picture of its own
DIFFUSION, WITH_ETA = ("BC-Diffusion", "Diffusion-QL"), ("TD3+BC", "Diffusion-QL")
CRITICS_FIRST = "Diffusion-QL, critics first"  # beside the paper's recipe, by one that its early overshoot cannot spoil
COURSE = 100  # looks at Diffusion-QL during its training
BANDWIDTH = 0.1  # h of the MMD


class Recipe(NamedTuple):
    updates: int = 100_000  # 1,000 epochs of 100
    lr: float = 3e-4
    decay: bool = False  # rates fall to 0 by half a cosine
    critic_first: int = 0  # updates of the critics alone, before those of everything


# Until the critics have flattened at the best corner, Q rises beyond it, and what climbs goes there, to the edge of the square.
# A policy whose last x̂0 lies outside of the square is clipped there, has no gradient left, and stays where a wiser critic would
# not have sent it. With critics that learn first it does not go; with decaying rates it comes to rest.
QUICK = {"cloning": Recipe(2000, 3e-3, decay=True), "climbing": Recipe(800, 3e-3, decay=True, critic_first=5000)}
FULL_CRITICS_FIRST = Recipe(20_000, decay=True, critic_first=50_000)


class Cell(NamedTuple):
    """One policy to train: all that its samples depend on."""

    method: str
    seed: int
    eta: float
    n_timesteps: int
    recipe: Recipe

    def configuration(self) -> dict:
        course = {"course": COURSE} if self.method == "Diffusion-QL" else {}
        return self._asdict() | {"recipe": self.recipe._asdict(), "data": f"the authors', seed {DATA_SEED}"} | course

    def path(self) -> Path:
        key = hashlib.sha256(json.dumps(self.configuration(), sort_keys=True).encode()).hexdigest()[:12]
        return CELLS / f"{self.method}-seed{self.seed}-{key}.safetensors"


def make_cell(method, seed, eta, n_timesteps, quick) -> Cell:
    """What a method does not depend on is left out, so that a change of it trains nothing anew."""
    recipe = QUICK["cloning" if method in CLONING else "climbing"] if quick else Recipe()
    return Cell(method, seed, eta if method in WITH_ETA else 0.0, n_timesteps if method in DIFFUSION else 0, recipe)


# ---------------------------------------------------------------------------------------------------------------------
# The data, and what is said of samples
# ---------------------------------------------------------------------------------------------------------------------


def draw_actions(rng, n) -> np.ndarray:
    """n other actions (n,2) like the data's, the corners one after the other."""
    corner = np.arange(n) * len(CORNERS) // n
    return (CORNERS[corner] + SIGMA * rng.standard_normal((n, ACTION_DIM))).clip(-1, 1)


def released_data() -> tuple[np.ndarray, np.ndarray]:
    """The authors' actions (N_DATA,2) and rewards (N_DATA,): torch's generator at their seed, asked in the order of their code."""
    generator, each = torch.Generator().manual_seed(DATA_SEED), N_DATA // len(CORNERS)
    means = torch.tensor(CORNERS, dtype=torch.float32)
    sigma = torch.full((each, ACTION_DIM), SIGMA)
    actions = [torch.normal(mean.expand(each, -1), sigma, generator=generator).clip(-1, 1) for mean in means]
    rewards = [mean + REWARD_SIGMA * torch.randn(each, generator=generator) for mean in REWARDS]
    return torch.cat(actions).numpy(), torch.cat(rewards).numpy()


def transitions() -> Transitions:
    actions, rewards = released_data()
    states = np.zeros((N_DATA, STATE_DIM))
    return Transitions(states, actions, states, rewards, np.ones(N_DATA))


def mmd(x, y, h=BANDWIDTH) -> float:
    """Maximum mean discrepancy of two samples (n,2), (m,2): kernel exp(-‖x-y‖²/2h²), pairs of a point with itself included."""

    def mean_kernel(x, y):
        return np.exp(((x[:, None] - y) ** 2).sum(axis=-1) / (-2 * h**2)).mean()

    return float(np.sqrt(max(mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y), 0.0)))


def shares(samples) -> np.ndarray:
    """Of samples (n,2): the share within 3σ of each corner (4,)."""
    distances = np.linalg.norm(samples[:, None] - CORNERS, axis=-1)
    return (distances <= 3 * SIGMA).mean(axis=0)


def figures(samples, data) -> dict:
    """What the table says of samples (n,2), by the rules above; data (m,2)."""
    found = shares(samples)
    return {
        "shares": dict(zip(NAMES, found.tolist())),
        "outside": float(1 - found.sum()),
        "reward": float(found @ REWARDS),
        "mmd": mmd(samples, data),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def build(cell: Cell):
    updates, lr, decay, _ = cell.recipe
    return METHODS[cell.method](cell.eta, cell.n_timesteps, lr, updates if decay else 0, cell.seed)


def train_cell(cell: Cell, compiled: bool) -> str:
    """Train a policy on one core, and keep its samples, the weights of a diffusion policy, the course of Diffusion-QL.

    A course is the shares (COURSE,4) at the corners after every 1/COURSE of the updates. Training goes on as if nobody looked.
    -> a line about it
    """
    torch.set_num_threads(1)
    method, data = build(cell), transitions()
    compiled = compiled and cell.method == "Diffusion-QL"  # the one that is slow: its gradient passes through the whole chain
    if compiled:
        method.compile()
    course, looks = [], {cell.recipe.updates * (i + 1) // COURSE for i in range(COURSE)}

    def look(done):
        if done in looks:
            before = method.generator.get_state()
            course.append(shares(method.sample(SAMPLES).numpy()))
            method.generator.set_state(before)

    watch = {"watch": look} if cell.method == "Diffusion-QL" else {}
    cpu, wall = time.process_time(), time.perf_counter()
    train(method, data, cell.recipe.updates, cell.recipe.critic_first, **watch)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    samples = method.sample(SAMPLES)
    tensors = {"samples": samples}
    if course:
        tensors["course"] = torch.tensor(np.array(course))
    if cell.method in DIFFUSION:
        tensors |= {f"policy.{name}": value for name, value in method.policy.state_dict().items()}
    save_tensors(cell.path(), tensors, {"cell": cell.configuration(), "cpu_s": cpu, "wall_s": wall, "compiled": compiled})
    which = f"{cell.method}{f', T = {cell.n_timesteps}' if cell.n_timesteps else ''}, seed {cell.seed}"
    which += ", critics first" if cell.recipe.critic_first else ""
    return f"{time.strftime('%H:%M:%S')} {which}: {wall:.0f} s, mean reward {shares(samples.numpy()) @ REWARDS:.2f}"


def train_cells(cells: list[Cell], jobs: int, compiled: bool) -> None:
    """Those that are not there yet, jobs of them side by side, the longest first."""
    missing = sorted((cell for cell in cells if not cell.path().exists()), key=lambda c: c.method != "Diffusion-QL")
    if missing:
        print(f"{len(missing)} of {len(cells)} policies to train, {min(jobs, len(missing))} side by side", flush=True)
    if jobs == 1 or len(missing) < 2:
        for cell in missing:
            print(train_cell(cell, compiled), flush=True)
        return
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(train_cell, cell, compiled) for cell in missing]):
                print(done.result(), flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # what has not begun shall not keep the error waiting
            raise


# ---------------------------------------------------------------------------------------------------------------------
# The fused sampler
# ---------------------------------------------------------------------------------------------------------------------


def fused_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # a CPU's is Triton's interpreter


def compare_fused(policy, n, draws=20, precision="fp16", seed=0) -> tuple[np.ndarray, dict]:
    """n actions by kernels.FusedSampler, and how far they are from as many eager ones, beside how far eager draws are apart.

    -> actions (n,2), {"fused": their MMD to an eager draw, "eager": [that of each of `draws` other eager ones], "same": whether
    the former exceeds the latter's mean by no more than three of their standard deviations}
    """
    state = torch.zeros(n, STATE_DIM, device=policy.final_layer.weight.device)
    generator = torch.Generator(state.device).manual_seed(seed)

    @torch.no_grad()
    def eager():
        noise = torch.randn(policy.n_timesteps + 1, n, ACTION_DIM, generator=generator, device=state.device)
        return policy.sample(state, x_T=noise[0], noises=noise[1:]).cpu().numpy()

    first, fused = eager(), kernels.FusedSampler(policy, precision)(state, seed=seed).cpu().numpy()
    apart = [mmd(eager(), first) for _ in range(draws)]
    found = mmd(fused, first)
    return fused, {"fused": found, "eager": apart, "same": bool(found <= np.mean(apart) + 3 * np.std(apart))}


# ---------------------------------------------------------------------------------------------------------------------
# The table and the pictures
# ---------------------------------------------------------------------------------------------------------------------


def collect(cell: Cell, data, fused: bool) -> tuple[np.ndarray, dict]:
    """A trained policy's samples, and what the table says of them."""
    tensors, saved = load_tensors(cell.path())
    samples, more = tensors["samples"].numpy(), {}
    if fused and cell.method in DIFFUSION:
        policy = build(cell).policy
        policy.load_state_dict({k.removeprefix("policy."): v for k, v in tensors.items() if k.startswith("policy.")})
        samples, more["fused"] = compare_fused(policy.to(fused_device()), SAMPLES)
    if "course" in tensors:
        more["course"] = [dict(zip(NAMES, found)) for found in tensors["course"].tolist()]
    how = {k: saved[k] for k in ("cpu_s", "wall_s", "compiled")}
    return samples, {"seed": cell.seed, **figures(samples, data), **how, **more}


def spread(values, digits=1) -> str:
    """Mean over seeds ± their standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


CORNER_COLUMNS = [f"{name}\npays {reward:g}" for name, reward in zip(NAMES, REWARDS)]
HEADER = ["% of samples", *CORNER_COLUMNS, "outside", "mean\nreward", "MMD\nto the data", "CPU s\nto train"]


def table(results: dict) -> list[list[str]]:
    """name -> its runs: a line each. The MMD is said of those that are to resemble the data."""
    lines = []
    for name, runs in results.items():
        line = [name, *(spread([100 * run["shares"][corner] for run in runs]) for corner in NAMES)]
        line += [spread([100 * run["outside"] for run in runs]), spread([run["reward"] for run in runs], 2)]
        line += ["" if name in (*CLIMBING, CRITICS_FIRST) else spread([run["mmd"] for run in runs], 3)]
        line += ["" if name == "data" else spread([run["cpu_s"] for run in runs], 0)]
        lines.append(line)
    return lines


def panel(axes, samples, title, colour) -> None:
    axes.scatter(*samples.T, s=7, alpha=0.35, color=colour, linewidths=0)
    for corner in CORNERS:
        axes.add_patch(Circle(corner, 3 * SIGMA, fill=False, linewidth=0.7, color="0.6"))
    beyond = (np.abs(samples) > 1.2).any(axis=1).mean()
    if beyond:
        box = dict(facecolor="white", edgecolor="none", alpha=0.85, pad=1.5)
        axes.text(0, -1.16, f"{100 * beyond:.0f} % lie outside the frame", ha="center", va="bottom", fontsize=9, bbox=box)
    axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal", xticks=(-0.8, 0, 0.8), yticks=(-0.8, 0, 0.8))
    axes.tick_params(labelsize=8, length=2)
    axes.set_title(title, fontsize=12)


def write_table(axes, lines, ruled) -> None:
    """Text in columns, with a rule above each of the lines numbered in ruled."""
    axes.set(xlim=(0, 1), ylim=(len(lines) + 0.3, -1.6))
    axes.axis("off")
    columns = [0.02, *np.linspace(0.23, 0.95, len(HEADER) - 1)]
    for y, line in enumerate([HEADER, *lines], start=-1):
        weight = "bold" if line[0] in (*DIFFUSION, CRITICS_FIRST) else "normal"
        how = dict(fontsize=10, color="0.25") if y < 0 else dict(fontsize=11, weight=weight)
        for i, (x, text) in enumerate(zip(columns, line)):
            axes.text(x, y + (0.2 if y < 0 else 0.5), text, ha="center" if i else "left", va="center", **how)
    for y in (0, *ruled, len(lines)):
        axes.axhline(y, xmin=0.01, xmax=0.99, color="black", linewidth=0.8)


CLONES, CLIMBS = "#0072b2", "#d55e00"


def draw(samples: dict, results: dict, data, note: str, path: Path) -> None:
    """The data and the cloning policies, the rewards and the climbing ones, and the table. samples: name -> (n,2)"""
    rows = [[name for name in kind if name in samples] for kind in (CLONING, (*CLIMBING, CRITICS_FIRST))]
    rows = [row for row in rows if row]
    columns = max(5, 1 + max(len(row) for row in rows))
    lines = table(results)
    heights = [14.5 / columns + 0.2] * len(rows) + [0.29 * (len(lines) + 2)]
    figure = Figure(figsize=(14.5, sum(heights) + 0.4), layout="constrained")
    *pictures, below = figure.subfigures(len(heights), 1, height_ratios=heights)
    for row, picture in zip(rows, pictures):
        first, *others = picture.subplots(1, columns)
        if row[0] in CLONING:
            panel(first, data, "data", "0.25")
        else:
            panel(first, data, "reward", "0.75")
            for corner, reward in zip(CORNERS, REWARDS):
                first.text(*(0.55 * corner), f"{reward:g}", ha="center", va="center", fontsize=13)
        for axes, name in zip(others, row):
            shown = samples[name] if name in CLONING else samples[name][:SHOWN]
            panel(axes, shown, name, CLONES if name in CLONING else CLIMBS)
        for axes in others[len(row) :]:
            axes.axis("off")
    write_table(below.subplots(), lines, ruled=[1] + [1 + len(row) for row in rows[:-1]])
    figure.suptitle(note, fontsize=9, color="0.35")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_steps(samples: dict, results: dict, data, note: str, path: Path) -> None:
    """BC-Diffusion by its number of steps. samples, results: T -> (n,2), runs"""
    figure = Figure(figsize=(14.5, 3.6), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(samples))
    panel(first, data, "data", "0.25")
    for axes, (n_timesteps, drawn) in zip(others, samples.items()):
        panel(axes, drawn, f"T = {n_timesteps}", CLONES)
        runs = results[n_timesteps]
        outside, distance = spread([100 * run["outside"] for run in runs]), spread([run["mmd"] for run in runs], 3)
        axes.set_xlabel(f"outside {outside} %,  MMD {distance}", fontsize=10)
    figure.suptitle(note, fontsize=9, color="0.35")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def draw_course(results: dict, updates: dict, note: str, path: Path) -> None:
    """What Diffusion-QL does while it trains, a line a seed. results: name -> its runs; updates: name -> how many"""
    figure = Figure(figsize=(14.5, 3.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, runs) in zip(panels, results.items()):
        for run in runs:
            at = [100 * found[NAMES[-1]] for found in run["course"]]
            axes.plot(np.linspace(0, updates[name], len(at) + 1)[1:], at, linewidth=1.2, label=f"seed {run['seed']}")
        axes.set(xlim=(0, updates[name]), ylim=(0, 100), xlabel="updates", title=name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("% of samples within 3σ\nof the best corner")
    panels[0].legend(fontsize=9)
    figure.suptitle(note, fontsize=9, color="0.35")
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def check(options) -> None:
    """Raises SystemExit, with one line, for what no run can have: before minutes go into training."""
    for name in options.methods:
        if name not in METHODS:
            raise SystemExit(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    if len(set(options.seeds)) < len(options.seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, options.seeds))} names a seed twice")
    least = {"T": (options.T, 1), "eta": (options.eta, 0), "jobs": (options.jobs, 1), "seeds": (min(options.seeds), 0)}
    for name, (value, at_least) in least.items():
        if not value >= at_least:
            raise SystemExit(f"--{name} must be at least {at_least}, not {value}")
    if not options.eta < float("inf"):
        raise SystemExit(f"--eta must be finite, not {options.eta}")
    if options.compile and not has_compiler():
        raise SystemExit("--compile needs a C++ compiler: install g++, or leave it out")
    if options.fused:
        policy = build(make_cell("BC-Diffusion", 0, 0.0, options.T, options.quick)).policy
        try:
            if kernels.why_not():
                raise ValueError(kernels.why_not())
            kernels.FusedSampler(policy.to(fused_device()))
        except ValueError as e:  # the latter where the kernels do not support so many steps
            raise SystemExit(f"--fused cannot be used: {e}") from e
    try:
        for folder in (options.out, CELLS):
            RunFolder.require_writable(str(folder))
            folder.mkdir(parents=True, exist_ok=True)
    except (RunError, OSError) as e:
        raise SystemExit(str(e)) from e


def make(options) -> None:
    """Train what is not there yet, then the figures, the pictures, the JSON and the table in print."""
    methods = [name for name in METHODS if name in options.methods]
    cells = {name: [make_cell(name, seed, options.eta, options.T, options.quick) for seed in options.seeds] for name in methods}
    climbing = {name: cells[name] for name in methods if name == "Diffusion-QL"}
    if climbing and not options.quick:
        climbing[CRITICS_FIRST] = [cell._replace(recipe=FULL_CRITICS_FIRST) for cell in climbing["Diffusion-QL"]]
        cells |= climbing
    steps = STEPS if "BC-Diffusion" in methods else ()
    sweep = {T: [make_cell("BC-Diffusion", seed, 0.0, T, quick=True) for seed in options.seeds] for T in steps}
    wanted = list(dict.fromkeys(cell for of_one in (*cells.values(), *sweep.values()) for cell in of_one))
    train_cells(wanted, options.jobs, options.compile)

    rng = np.random.default_rng(DATA_SEED + 1)
    data, again = (draw_actions(rng, SAMPLES) for _ in range(2))
    found = {cell: collect(cell, data, options.fused) for cell in wanted}
    samples = {name: found[of_one[0]][0] for name, of_one in cells.items()}
    results = {"data": [figures(again, data)]} | {name: [found[cell][1] for cell in of_one] for name, of_one in cells.items()}
    by_steps = {T: [found[cell][1] for cell in of_one] for T, of_one in sweep.items()}

    where = describe()
    name = "bandit" + "_quick" * options.quick + "_fused" * options.fused
    recipe = "quick recipe" if options.quick else "the paper's recipe"
    seeds = f"{'seeds' if len(options.seeds) > 1 else 'seed'} {', '.join(map(str, options.seeds))}"
    made = f"{seeds}; {where['date']}, commit {where['commit']}"
    note = f"{recipe}, {made}"
    draw(samples, results, data, f"η = {options.eta:g}, T = {options.T}, {note}", options.out / f"{name}.png")
    if sweep:
        drawn = {T: found[of_one[0]][0] for T, of_one in sweep.items()}
        title = f"BC-Diffusion by its number of steps T; quick recipe, {made}"
        draw_steps(drawn, by_steps, data, title, options.out / f"{name}_steps.png")
    if climbing and not options.fused:
        updates = {name: of_one[0].recipe.updates for name, of_one in climbing.items()}
        course = {name: results[name] for name in climbing}
        draw_course(course, updates, f"Diffusion-QL while it trains; {note}", options.out / f"{name}_course.png")
    how = {"quick": options.quick, "eta": options.eta, "T": options.T, "samples": SAMPLES, "bandwidth": BANDWIDTH, "threads": 1}
    how["recipes"] = {name: of_one[0].recipe._asdict() for name, of_one in cells.items()}
    if sweep:
        how["recipes"]["steps"] = QUICK["cloning"]._asdict()
    save_json(options.out / f"{name}.json", {**where, **how, "methods": results, "steps": by_steps})
    lines = [HEADER, *table(results), *table({f"BC, T = {T}, quick": runs for T, runs in by_steps.items()})]
    for line in lines:
        first, *others = (text.replace("\n", ", ") for text in line)
        print(f"{first:<27s}", *(f"{text:>18s}" for text in others))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", help="the first is drawn; default 2022 2023 2024, quick 2022")
    parser.add_argument("--eta", type=float, default=2.5, help="η of TD3+BC and Diffusion-QL")
    parser.add_argument("--T", type=int, default=50, help="steps of the diffusion policies")
    parser.add_argument("--quick", action="store_true", help="2,000 updates, 800 of what climbs, at ten times the rate, decaying")
    parser.add_argument("--compile", action="store_true", help="compile Diffusion-QL's update: minutes first, then twice as fast")
    parser.add_argument("--fused", action="store_true", help="draw the diffusion policies' samples with the fused sampler")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="policies trained side by side, a core each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or ([2022] if options.quick else [2022, 2023, 2024])
    check(options)
    try:
        make(options)
    except RunError as e:
        raise SystemExit(str(e)) from e


if __name__ == "__main__":
    sys.exit(main())

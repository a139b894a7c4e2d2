"""The paper's 2-D bandit: diffusion against six other policies, pictures and a table.

    python -m experiments.bandit --quick    # a rough picture: 1 to 2 minutes on two idle cores
    python -m experiments.bandit --compile  # the paper's 100,000 updates, three seeds: hours
    python -m experiments.bandit --methods BC-MLE BC-Diffusion --seeds 2022
    python -m experiments.bandit --fused    # drawn by the fused sampler, on a GPU

Four policies clone data with four modes, four also climb the reward (bandit_policies.py);
bandit_data.py says what the data are and what the figures mean. BC-Diffusion is also trained, by
the quick recipe, with 2 to 50 steps. The data are the authors' own 10,000, the same for all; a seed
gives weights, minibatches and noise. Which 10,000 they are matters to the paper's recipe: by chance
rewards have a slope within a corner, a critic learns it in 100,000 updates, and Diffusion-QL climbs
it. That recipe can also leave part of Diffusion-QL at the edge of the square, and where a seed ends
is chance (bandit_course.png); a line of its own shows it with critics that learn first.

Every trained policy is kept in runs/bandit, under the whole configuration that made it: an
interrupted command goes on from there, and commands that need the same policies share them. After a
change of how they train, empty that folder. Writes bandit.png, bandit_steps.png, bandit_course.png
and bandit.json to runs/experiments (--out); after --quick or --fused their names say so. The
table's figures are of 1,000 samples a seed, ± the standard deviation over seeds; CPU s is what
training took of one core.
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

import kernels
from bench.folders import add_results_option, make_folder
from experiments.bandit_data import (
    ACTION_DIM,
    BANDWIDTH,
    DATA_SEED,
    NAMES,
    REWARDS,
    STATE_DIM,
    draw_actions,
    figures,
    mmd,
    shares,
    transitions,
)
from experiments.bandit_pictures import (
    CRITICS_FIRST,
    HEADER,
    draw,
    draw_steps,
    draw_training,
    table,
)
from experiments.bandit_policies import CLONING, DIFFUSION, METHODS, WITH_ETA, train
from experiments.runs import ROOT, say
from kernels.eager import has_compiler
from trainer.folder import RunError, load_tensors, save_json, save_tensors
from trainer.provenance import describe
from trainer.terminal import steady_output

POLICIES = ROOT / "runs" / "bandit"
SAMPLES = 1000
STEPS = (2, 5, 10, 50)  # T in the picture of its own
LOOKS = 100  # at Diffusion-QL during its training


class Recipe(NamedTuple):
    updates: int = 100_000  # 1,000 epochs of 100
    lr: float = 3e-4
    decay: bool = False  # rates fall to 0 by half a cosine
    critic_first: int = 0  # updates of the critics alone, before those of everything


# Until the critics have flattened at the best corner, Q rises beyond it, and a policy that climbs Q
# goes there, to the edge of the square. If its last x̂0 lies outside of the square it is clipped,
# has no gradient left, and stays there even when the critics know better. With critics that learn
# first it does not go there; with decaying rates it comes to rest.
QUICK = {
    "cloning": Recipe(2000, 3e-3, decay=True),
    "climbing": Recipe(800, 3e-3, decay=True, critic_first=5000),
}
FULL_CRITICS_FIRST = Recipe(20_000, decay=True, critic_first=50_000)


class Job(NamedTuple):
    """One policy to train: all that its samples depend on."""

    method: str
    seed: int
    eta: float
    n_timesteps: int
    recipe: Recipe

    def configuration(self) -> dict:
        found = self._asdict() | {"recipe": self.recipe._asdict()}
        found["data"] = f"the authors', seed {DATA_SEED}"
        return found | ({"course": LOOKS} if self.method == "Diffusion-QL" else {})

    def path(self) -> Path:
        text = json.dumps(self.configuration(), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return POLICIES / f"{self.method}-seed{self.seed}-{key}.safetensors"


def make_job(method, seed, eta, n_timesteps, quick) -> Job:
    """What a method does not depend on is 0, so that a change of it trains nothing anew."""
    recipe = QUICK["cloning" if method in CLONING else "climbing"] if quick else Recipe()
    eta = eta if method in WITH_ETA else 0.0
    return Job(method, seed, eta, n_timesteps if method in DIFFUSION else 0, recipe)


# ---- Training ------------------------------------------------------------------------------------


def build(job: Job):
    return METHODS[job.method](job.eta, job.n_timesteps, job.recipe.lr, job.seed)


def train_job(job: Job, compiled: bool) -> str:
    """Train a policy on one core, and keep its samples and a diffusion policy's weights.

    Of Diffusion-QL also the training curve: the shares (LOOKS,4) at the corners after every 1/LOOKS
    of the updates. Looking changes nothing of the training. -> a line about it
    """
    torch.set_num_threads(1)
    method, data, recipe = build(job), transitions(), job.recipe
    watched = job.method == "Diffusion-QL"
    compiled = compiled and watched  # the slow one: its gradient passes through the whole chain
    if compiled:
        method.compile()
    curve, looks = [], {recipe.updates * (i + 1) // LOOKS for i in range(LOOKS)}

    def look(done):
        if done in looks:
            before = method.generator.get_state()
            curve.append(shares(method.sample(SAMPLES).numpy()))
            method.generator.set_state(before)

    how = recipe.updates, recipe.decay, recipe.critic_first, look if watched else None
    cpu, wall = time.process_time(), time.perf_counter()
    train(method, data, *how)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    samples = method.sample(SAMPLES)
    tensors = {"samples": samples}
    if curve:
        tensors["course"] = torch.tensor(np.array(curve))
    if job.method in DIFFUSION:
        tensors |= {f"policy.{name}": x for name, x in method.policy.state_dict().items()}
    about = {"cell": job.configuration(), "cpu_s": cpu, "wall_s": wall, "compiled": compiled}
    save_tensors(job.path(), tensors, about)
    which = f"{job.method}{f', T = {job.n_timesteps}' * (job.n_timesteps > 0)}, seed {job.seed}"
    which += ", critics first" * (recipe.critic_first > 0)
    return f"{which}: {wall:.0f} s, mean reward {shares(samples.numpy()) @ REWARDS:.2f}"


def train_jobs(jobs: list[Job], at_once: int, compiled: bool) -> None:
    """Those that are not there yet, some at once, the longest first."""
    missing = [job for job in jobs if not job.path().exists()]
    missing.sort(key=lambda job: job.method != "Diffusion-QL")
    n = min(at_once, len(missing))
    if missing:
        say(f"{len(missing)} of {len(jobs)} policies to train, {n} side by side")
    if n < 2:
        for job in missing:
            say(train_job(job, compiled))
        return
    with ProcessPoolExecutor(n, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(train_job, job, compiled) for job in missing]):
                say(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # report the error without the others
            raise


# ---- The fused sampler ---------------------------------------------------------------------------


def fused_device() -> torch.device:
    """On a CPU the kernels run in Triton's interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare_fused(policy, n, draws=20, precision="fp16", seed=0) -> tuple[np.ndarray, dict]:
    """n actions by kernels.FusedSampler, and whether they are as near to an eager draw as other
    eager draws are.

    -> actions (n,2), {"fused": their MMD to an eager draw, "eager": [that of each of `draws` other
    eager ones], "same": whether the former exceeds the latter's mean by no more than three of their
    standard deviations}
    """
    device = policy.final_layer.weight.device
    state, generator = torch.zeros(n, STATE_DIM, device=device), torch.Generator(device)
    generator.manual_seed(seed)

    @torch.no_grad()
    def eager():
        shape = policy.n_timesteps + 1, n, ACTION_DIM
        noise = torch.randn(shape, generator=generator, device=device)
        return policy.sample(state, x_T=noise[0], noises=noise[1:]).cpu().numpy()

    first, fused = eager(), kernels.FusedSampler(policy, precision)(state, seed=seed)
    fused = fused.cpu().numpy()
    apart, found = [mmd(eager(), first) for _ in range(draws)], mmd(fused, first)
    same = bool(found <= np.mean(apart) + 3 * np.std(apart))
    return fused, {"fused": found, "eager": apart, "same": same}


# ---- Command line --------------------------------------------------------------------------------


def collect(job: Job, data, fused: bool) -> tuple[np.ndarray, dict]:
    """A trained policy's samples, and what the table says of them."""
    tensors, saved = load_tensors(job.path())
    samples, more = tensors["samples"].numpy(), {}
    if fused and job.method in DIFFUSION:
        policy, prefix = build(job).policy, "policy."
        weights = {k: v for k, v in tensors.items() if k.startswith(prefix)}
        policy.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items()})
        samples, more["fused"] = compare_fused(policy.to(fused_device()), SAMPLES)
    if "course" in tensors:
        more["course"] = [dict(zip(NAMES, found)) for found in tensors["course"].tolist()]
    how = {k: saved[k] for k in ("cpu_s", "wall_s", "compiled")}
    return samples, {"seed": job.seed, **figures(samples, data), **how, **more}


def check(options) -> None:
    """Raises SystemExit, with one line, for what no run can have, before anything is trained."""
    for name in options.methods:
        if name not in METHODS:
            raise SystemExit(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    if len(set(options.seeds)) < len(options.seeds):
        raise SystemExit(f"--seeds {' '.join(map(str, options.seeds))} names a seed twice")
    least = {"T": (options.T, 1), "eta": (options.eta, 0), "jobs": (options.jobs, 1)}
    for name, (value, at_least) in {**least, "seeds": (min(options.seeds), 0)}.items():
        if not value >= at_least:
            raise SystemExit(f"--{name} must be at least {at_least}, not {value}")
    if not options.eta < float("inf"):
        raise SystemExit(f"--eta must be finite, not {options.eta}")
    if options.compile and not has_compiler():
        raise SystemExit("--compile needs a C++ compiler: install g++, or leave it out")
    if options.fused:
        policy = build(make_job("BC-Diffusion", 0, 0.0, options.T, options.quick)).policy
        try:
            if kernels.why_not():
                raise ValueError(kernels.why_not())
            kernels.FusedSampler(policy.to(fused_device()))
        except ValueError as e:  # for example, the kernels do not support so many steps
            raise SystemExit(f"--fused cannot be used: {e}") from e
    for folder in (options.out, POLICIES):
        make_folder(folder)


def make(options) -> None:
    """Train what is not there yet, then the pictures, the JSON and the table in print."""
    quick, seeds, T = options.quick, options.seeds, options.T
    methods = [name for name in METHODS if name in options.methods]
    jobs = {m: [make_job(m, seed, options.eta, T, quick) for seed in seeds] for m in methods}
    curves = [name for name in methods if name == "Diffusion-QL"]
    if curves and not quick:
        later = [job._replace(recipe=FULL_CRITICS_FIRST) for job in jobs["Diffusion-QL"]]
        jobs[CRITICS_FIRST] = later
        curves.append(CRITICS_FIRST)
    by_steps = {}
    for n in STEPS if "BC-Diffusion" in methods else ():
        by_steps[n] = [make_job("BC-Diffusion", seed, 0.0, n, quick=True) for seed in seeds]
    wanted = [job for group in (*jobs.values(), *by_steps.values()) for job in group]
    wanted = list(dict.fromkeys(wanted))
    train_jobs(wanted, options.jobs, options.compile)

    rng = np.random.default_rng(DATA_SEED + 1)
    data, again = (draw_actions(rng, SAMPLES) for _ in range(2))
    found = {job: collect(job, data, options.fused) for job in wanted}
    samples = {name: found[group[0]][0] for name, group in jobs.items()}
    results = {name: [found[job][1] for job in group] for name, group in jobs.items()}
    results = {"data": [figures(again, data)]} | results
    steps = {n: [found[job][1] for job in group] for n, group in by_steps.items()}

    where, path = describe(), options.out / "bandit"
    path = path.with_name("bandit" + "_quick" * quick + "_fused" * options.fused)
    recipe = "quick recipe" if quick else "the paper's recipe"
    made = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    made += f"; {where['date']}, commit {where['commit']}"
    note = f"η = {options.eta:g}, T = {T}, {recipe}, {made}"
    draw(samples, results, data, note, path.with_suffix(".png"))
    if steps:
        drawn = {n: found[group[0]][0] for n, group in by_steps.items()}
        note = f"BC-Diffusion by its number of steps T; quick recipe, {made}"
        draw_steps(drawn, steps, data, note, path.with_name(f"{path.name}_steps.png"))
    if curves and not options.fused:
        updates = {name: jobs[name][0].recipe.updates for name in curves}
        runs = {name: results[name] for name in curves}
        note = f"Diffusion-QL while it trains; {recipe}, {made}"
        draw_training(runs, updates, note, path.with_name(f"{path.name}_course.png"))
    recipes = {name: group[0].recipe._asdict() for name, group in jobs.items()}
    if steps:
        recipes["steps"] = QUICK["cloning"]._asdict()
    how = {"quick": quick, "eta": options.eta, "T": T, "samples": SAMPLES, "bandwidth": BANDWIDTH}
    how |= {"threads": 1, "recipes": recipes}
    save_json(path.with_suffix(".json"), {**where, **how, "methods": results, "steps": steps})
    named = {f"BC, T = {n}, quick": runs for n, runs in steps.items()}
    for line in [HEADER, *table(results), *table(named)]:
        first, *others = (text.replace("\n", ", ") for text in line)
        print(f"{first:<27s}", *(f"{text:>18s}" for text in others))
    print(f"figures in {path}.json, pictures in {path}*.png")


@steady_output()
def main(argv: list[str] | None = None) -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add, cores = parser.add_argument, os.cpu_count()
    add("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    which = "the first is drawn; default 2022 2023 2024, quick 2022"
    add("--seeds", "--seed", type=int, nargs="+", help=which)
    add("--eta", type=float, default=2.5, help="η of TD3+BC and Diffusion-QL")
    add("--T", type=int, default=50, help="steps of the diffusion policies")
    what = "2,000 updates, 800 of what climbs, at ten times the rate, decaying"
    add("--quick", action="store_true", help=what)
    what = "compile Diffusion-QL's update: minutes first, then 1.7 times as fast"
    add("--compile", action="store_true", help=what)
    what = "draw the diffusion policies' samples with the fused sampler"
    add("--fused", action="store_true", help=what)
    add("--jobs", type=int, default=cores, help="policies trained side by side, a core each")
    add_results_option(parser, "experiments")
    options = parser.parse_args(argv)
    options.seeds = options.seeds or ([2022] if options.quick else [2022, 2023, 2024])
    check(options)
    try:
        make(options)
    except RunError as e:
        raise SystemExit(str(e)) from e


if __name__ == "__main__":
    sys.exit(main())

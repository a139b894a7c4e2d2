"""Behaviour cloning against Diffusion-QL: learning curves over several seeds, trained with dql.py's own command line.

    python -m bench.learning_curves                     # antmaze-umaze-v0, quick recipe, seeds 0 1 2: an hour of CPU
    python -m bench.learning_curves --jobs 2 --threads 1 --backend compile

Each run is the command `python dql.py --env ENV --data DATA --algo ALGO --seed SEED --quick`, in runs/learning_curves. A run
that is there is not made again, one that was interrupted is resumed; after a change of the generated data take another --out.
Writes bench/results/learning_curves.json and .png.
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

import tasks
from atomic import written_whole
from bench import machine
from dql import recipe_config
from run_folder import RunFolder, save_json
from tasks.generate import cached

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COLOURS = {"bc": "tab:orange", "ql": "tab:blue"}
NAMES = {"bc": "behaviour cloning (--algo bc)", "ql": "Diffusion-QL (--algo ql)"}


def find_run(out: Path, options: dict) -> Path | None:
    """The newest run folder below out that was made with these options and today's quick recipe."""
    wanted = asdict(recipe_config(options["env"], quick=True)) | options
    wanted = json.loads(json.dumps({k: v for k, v in wanted.items() if k not in ("out", "threads")}))  # tuples are lists there
    for config in sorted(out.glob("*/config.json"), reverse=True):
        saved = json.loads(config.read_text())["config"]
        if all(saved.get(k) == v for k, v in wanted.items()):
            return config.parent
    return None


def finished(run: Path) -> bool:
    config = RunFolder(run).config()["config"]
    last = (run / "log.jsonl").read_text().splitlines()[-1:]
    total = config["epochs"] * config["updates_per_epoch"]
    return any(r["kind"] == "evaluation" and r["step"] == total for r in map(json.loads, last))


def make_run(options: dict, out: Path, threads: int, program=("dql.py",)) -> Path:
    """Train with these options, or finish what an earlier call began, by program, which takes them. -> the run's folder"""
    before = find_run(out, options)
    if before is not None and finished(before):
        return before
    command = [sys.executable, *program, "--threads", str(threads)]
    if before is not None:
        command += ["--resume", str(before)]
    else:
        command += ["--out", str(out)]
        for name, value in options.items():
            option = f"--{name.replace('_', '-')}"
            command += [option] if value is True else [option, str(value)]
    print(f"{time.strftime('%H:%M:%S')} {' '.join(command[1:])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    return before or find_run(out, options)


def collect(run: Path) -> dict:
    """What the figure and the table need of a run."""
    folder = RunFolder(run)
    saved = folder.config()
    folder.records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    evaluations = folder.evaluations()
    updates = [r["updates_per_second"] for r in folder.records if r["kind"] == "epoch"]
    return {
        "algo": saved["config"]["algo"],
        "seed": saved["config"]["seed"],
        "data": saved["data"],
        "config": {k: v for k, v in saved["config"].items() if k != "out"},  # a path of this machine
        "versions": saved["versions"],
        "updates_per_second_median": float(np.median(updates)),
        "evaluations": [{k: e[k] for k in ("step", "score", "bc_loss", "mean_length", "seconds")} for e in evaluations],
        "selection": json.loads((run / "selection.json").read_text()),
    }


def data_statistics(env: str) -> dict:
    """What the generator wrote into its file about the data: success, share of terminals, recipe, versions."""
    with h5py.File(cached(tasks.get(env))) as file:
        return {name: np.asarray(value).tolist() for name, value in file.attrs.items()}


def summarise(runs: list[dict]) -> dict:
    """Per algorithm: the mean and spread (standard deviation over seeds) of the last and of the best score."""
    summary = {}
    for algo in sorted({r["algo"] for r in runs}):
        of_algo = [r for r in runs if r["algo"] == algo]
        summary[algo] = {"seeds": [r["seed"] for r in of_algo]}
        for rule in ("last", "best", "offline", "offline_released"):
            scores = [r["selection"][rule]["score"] for r in of_algo]
            spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
            summary[algo][rule] = {"scores": scores, "mean": float(np.mean(scores)), "std": spread}
    return summary


def draw(runs: list[dict], folders: list[Path], env: str, path: Path) -> None:
    """Left, the paths of the first seed's last evaluation for each algorithm; right, the scores of all seeds."""
    algos = sorted({r["algo"] for r in runs})
    figure = Figure(figsize=(4.2 * len(algos) + 6, 4.8), layout="constrained")
    *pictures, axes = figure.subplots(1, len(algos) + 1, width_ratios=[1] * len(algos) + [1.4])
    for picture, algo in zip(pictures, algos):
        run, folder = next((r, f) for r, f in zip(runs, folders) if r["algo"] == algo)
        picture.imshow(imread(folder / f"episodes_{run['evaluations'][-1]['step']:08d}.png"))
        picture.set_title(NAMES[algo], fontsize=10)
        picture.axis("off")
    for algo in algos:
        curves = [r["evaluations"] for r in runs if r["algo"] == algo]
        steps = [e["step"] for e in curves[0]]
        scores = np.array([[e["score"] for e in curve] for curve in curves])
        for curve in scores:
            axes.plot(steps, curve, color=COLOURS[algo], alpha=0.3, linewidth=1)
        axes.plot(steps, scores.mean(axis=0), "o-", color=COLOURS[algo], label=f"{NAMES[algo]}, mean of {len(scores)} seeds")
    axes.set(xlabel="updates", ylabel="normalised score (% of goals reached)", ylim=(-2, 102))
    axes.set_title(f"{env}, quick recipe\n{runs[0]['data']['label']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="antmaze-umaze-v0")
    parser.add_argument("--data", default="generated", help="as dql.py's --data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algos", nargs="+", choices=("bc", "ql"), default=["ql", "bc"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each run; 0: all cores")
    parser.add_argument("--backend", default="auto", help="as dql.py's --backend")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "learning_curves")
    arguments = parser.parse_args()

    wanted = [
        {"env": arguments.env, "data": arguments.data, "algo": algo, "seed": seed, "quick": True, "backend": arguments.backend}
        for algo in arguments.algos
        for seed in arguments.seeds
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = list(pool.map(lambda options: make_run(options, arguments.out, arguments.threads), wanted))
    runs = [collect(folder) for folder in folders]
    summary = summarise(runs)
    RESULTS.mkdir(exist_ok=True)
    results = {**machine.describe(), "summary": summary, "runs": runs}
    if arguments.data == "generated":
        results["data_statistics"] = data_statistics(arguments.env)
    save_json(RESULTS / "learning_curves.json", results)
    draw(runs, folders, arguments.env, RESULTS / "learning_curves.png")
    for algo, rules in summary.items():
        print(algo, {rule: f"{rules[rule]['mean']:.1f} ± {rules[rule]['std'] or 0:.1f}" for rule in rules if rule != "seeds"})


if __name__ == "__main__":
    main()

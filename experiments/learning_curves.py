"""Behaviour cloning against Diffusion-QL: learning curves over several seeds.

    python -m experiments.learning_curves # antmaze-umaze-v0, quick recipe, 3 seeds: an hour of CPU
    python -m experiments.learning_curves --jobs 2 --threads 1 --backend compile

Each run is the command `python dql.py --env ENV --data DATA --algo ALGO --seeds SEED --quick`, in
runs/learning_curves. After a change of the generated data take another --out. Writes
experiments/results/learning_curves.json and .png.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from matplotlib.figure import Figure
from matplotlib.image import imread

import tasks
from experiments.runs import RESULTS, ROOT, complete, load, make_job, records
from tasks.generate import cached
from trainer.folder import save_json, saved
from trainer.provenance import describe
from trainer.scores import mean_and_spread, mean_and_std

COLOURS = {"bc": "tab:orange", "ql": "tab:blue"}
RULES = ("last", "best", "offline", "offline_released")
NAMES = {"bc": "behaviour cloning (--algo bc)", "ql": "Diffusion-QL (--algo ql)"}


def collect(run: Path) -> dict:
    """What the figure and the table need of a run."""
    about = load(run / "config.json")
    config = about["config"]
    shown = ("step", "score", "bc_loss", "mean_length", "seconds")
    updates = [r["updates_per_second"] for r in records(run, "epoch")]
    return {
        "algo": config["algo"],
        "seed": config["seed"],
        "data": about["data"],
        "config": {k: v for k, v in config.items() if k != "out"},  # a path of this machine
        "versions": about["versions"],
        "updates_per_second_median": float(np.median(updates)),
        "evaluations": [{k: e[k] for k in shown} for e in records(run, "evaluation")],
        "selection": load(run / "selection.json"),
    }


def data_statistics(env: str) -> dict:
    """What the generator wrote into its file: success, share of terminals, recipe, versions."""
    with h5py.File(cached(tasks.get(env))) as file:
        return {name: np.asarray(value).tolist() for name, value in file.attrs.items()}


def summarise(runs: list[dict]) -> dict:
    """Per algorithm and selection rule: the scores, their mean and standard deviation."""
    summary = {}
    for algo in sorted({r["algo"] for r in runs}):
        of_algo = [r for r in runs if r["algo"] == algo]
        summary[algo] = {"seeds": [r["seed"] for r in of_algo]}
        for rule in RULES:
            scores = [r["selection"][rule]["score"] for r in of_algo]
            mean, std = mean_and_std(scores)
            summary[algo][rule] = {"scores": scores, "mean": mean, "std": std}
    return summary


def draw(runs: list[dict], folders: list[Path], env: str, path: Path) -> None:
    """Left, the first seed's last evaluation for each algorithm; right, the scores of all seeds."""
    algos = sorted({r["algo"] for r in runs})
    figure = Figure(figsize=(4.2 * len(algos) + 6, 4.8), layout="constrained")
    widths = [1] * len(algos) + [1.4]
    *pictures, axes = figure.subplots(1, len(algos) + 1, width_ratios=widths)
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
        label = f"{NAMES[algo]}, mean of {len(scores)} seeds"
        axes.plot(steps, scores.mean(axis=0), "o-", color=COLOURS[algo], label=label)
    axes.set(xlabel="updates", ylabel="normalised score (% of goals reached)", ylim=(-2, 102))
    axes.set_title(f"{env}, quick recipe\n{runs[0]['data']['label']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    with saved(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def main(argv: list[str] | None = None) -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add, algos = parser.add_argument, ["ql", "bc"]
    add("--env", default="antmaze-umaze-v0")
    add("--data", default="generated", help="as dql.py's --data")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--algos", nargs="+", choices=algos, default=algos)
    add("--jobs", type=int, default=1, help="runs at the same time")
    add("--threads", type=int, default=0, help="CPU threads of each run; 0: all cores")
    add("--backend", default="auto", help="as dql.py's --backend")
    add("--out", type=Path, default=ROOT / "runs" / "learning_curves")
    asked = parser.parse_args(argv)

    jobs, how = [], ["--quick", "--threads", str(asked.threads), "--backend", asked.backend]
    for algo in asked.algos:
        for seed in asked.seeds:
            options = [*how, "--algo", algo, "--data", asked.data]
            about = {"name": f"{algo}, seed {seed}", "output": f"output-{algo}-seed{seed}.txt"}
            jobs.append(make_job(asked.env, [seed], options, asked.out, **about))
    if asked.data == "generated":
        cached(tasks.get(asked.env))  # once, before several runs would each do it
    folders = complete(jobs, asked.jobs)
    runs = [collect(folder) for folder in folders]
    summary = summarise(runs)
    RESULTS.mkdir(exist_ok=True)
    results = {**describe(), "summary": summary, "runs": runs}
    if asked.data == "generated":
        results["data_statistics"] = data_statistics(asked.env)
    save_json(RESULTS / "learning_curves.json", results)
    draw(runs, folders, asked.env, RESULTS / "learning_curves.png")
    for algo, of_algo in summary.items():
        print(algo, {rule: mean_and_spread(of_algo[rule]["scores"]) for rule in RULES})


if __name__ == "__main__":
    main()

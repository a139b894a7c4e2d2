"""Behaviour cloning against Diffusion-QL: learning curves over several seeds.

    python -m experiments.learning_curves  # antmaze-umaze-v0, quick recipe, three seeds
    python -m experiments.learning_curves --jobs 3 --threads 1 --backend compile  # an hour on two
                                           # idle cores

Each run is the command `python dql.py --env ENV --data DATA --algo ALGO --seeds SEED --quick`, in
runs/learning_curves (--out). After a change of the generated data take another --out. Writes
learning_curves.json and .png to runs/experiments (--results).
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

import tasks
from bench.folders import add_results_option, make_folder
from experiments.runs import ROOT, complete, load, make_job, records
from tasks.generate import cached
from tasks.pictures import FAILED, REACHED, START, WALL, add_title
from trainer.folder import save_json, saved
from trainer.interrupts import as_exceptions
from trainer.provenance import describe
from trainer.scores import mean_and_spread, mean_and_std
from trainer.terminal import steady_output

COLOURS = {"bc": "0.5", "ql": "tab:purple"}  # not the paths' blue and orange
RULES = ("last", "best", "offline", "offline_released")
NAMES = {"bc": "behaviour cloning", "ql": "Diffusion-QL"}


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


def maze_in(picture: np.ndarray) -> np.ndarray:
    """The maze in an evaluation's picture (h,w,3 or 4), without the words around it: too small."""
    is_wall = (np.abs(picture[:, :, :3] - to_rgb(WALL)) < 0.01).all(axis=2)
    rows, columns = (np.flatnonzero(is_wall.any(axis=axis)) for axis in (1, 0))
    return picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def draw(runs: list[dict], folders: list[Path], env: str, path: Path) -> None:
    """Left, the first seed's last evaluation for each algorithm; right, the scores of all seeds."""
    algos, is_maze = sorted({r["algo"] for r in runs}), tasks.get(env).family == "antmaze"
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")  # shown 800 pixels wide
    *pictures, axes = figure.subplots(1, len(algos) + 1, width_ratios=[1] * len(algos) + [1.3])
    for picture, algo in zip(pictures, algos):
        run, folder = next((r, f) for r, f in zip(runs, folders) if r["algo"] == algo)
        last = run["evaluations"][-1]
        drawn = imread(folder / f"episodes_{last['step']:08d}.png")
        picture.imshow(maze_in(drawn) if is_maze else drawn)
        which = f"seed {run['seed']}: score {last['score']:.0f}"
        picture.set_title(f"{NAMES[algo]}\n{which}", fontsize=10)
        picture.axis("off")
    for algo in algos:
        curves = [r["evaluations"] for r in runs if r["algo"] == algo]
        steps = [e["step"] for e in curves[0]]
        scores = np.array([[e["score"] for e in curve] for curve in curves])
        for curve in scores:
            axes.plot(steps, curve, color=COLOURS[algo], alpha=0.4, linewidth=1)
        axes.plot(steps, scores.mean(axis=0), "o-", color=COLOURS[algo], label=NAMES[algo])
    what = "score: % of goals reached" if is_maze else "normalised score"
    axes.set_title(f"{what}\nseeds ({len(scores)}) and their mean", fontsize=10)
    axes.set_xlabel("updates", fontsize=9)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 5, 10]))
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left")
    if is_maze:
        axes.set_ylim(-2, 102)
        paths = ((REACHED, "reached its goal"), (FAILED, "did not reach it"))
        handles = [Line2D([], [], color=colour, label=text) for colour, text in paths]
        handles += [Line2D([], [], linestyle="", marker="*", color=START, label="start")]
        figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9, frameon=False)
    add_title(figure, f"quick recipe on {runs[0]['data']['label']}")
    with saved(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160)


@steady_output()
@as_exceptions()
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
    add("--out", type=Path, default=ROOT / "runs" / "learning_curves", help="folder of the runs")
    add_results_option(parser, "experiments", "--results")
    asked = parser.parse_args(argv)
    make_folder(asked.results, "--results")

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
    results = {**describe(), "summary": summary, "runs": runs}
    if asked.data == "generated":
        results["data_statistics"] = data_statistics(asked.env)
    path = asked.results / "learning_curves"
    save_json(path.with_suffix(".json"), results)
    draw(runs, folders, asked.env, path.with_suffix(".png"))
    for algo, of_algo in summary.items():
        print(algo, {rule: mean_and_spread(of_algo[rule]["scores"]) for rule in RULES})
    print(f"figures in {path}.json, curves in {path}.png")


if __name__ == "__main__":
    main()

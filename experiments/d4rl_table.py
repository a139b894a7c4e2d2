"""The paper's table from finished runs: Markdown, CSV, JSON and a picture. Called by d4rl.py.

    runs = collect(jobs)                   # runs.Job, one a task
    make_rows(seeds, runs, failures)       # a row for each task and data set
    make_aggregates(rows)                  # the IQM of each group of tasks, as in rliable
    write(results, jobs, runs, options)    # all of it: d4rl.md, d4rl.csv, d4rl.json, d4rl.png

A score on generated data is not a D4RL score: the two are never in one mean, and each row says
which it is.
"""

import csv
import math
import re
from pathlib import Path

import numpy as np
import scipy.stats
from matplotlib.figure import Figure

import tasks
from experiments.runs import Job, finished_runs, load, without_free
from trainer.folder import save_json, saved
from trainer.provenance import describe
from trainer.scores import mean_and_spread, mean_and_std

# The paper's scores: mean and spread with offline selection, mean with online selection.
PUBLISHED = {
    "halfcheetah-medium-v2": (51.1, 0.5, 51.5),
    "hopper-medium-v2": (90.5, 4.6, 96.6),
    "walker2d-medium-v2": (87.0, 0.9, 87.3),
    "halfcheetah-medium-replay-v2": (47.8, 0.3, 48.3),
    "hopper-medium-replay-v2": (101.3, 0.6, 102.0),
    "walker2d-medium-replay-v2": (95.5, 1.5, 98.0),
    "halfcheetah-medium-expert-v2": (96.8, 0.3, 97.2),
    "hopper-medium-expert-v2": (111.1, 1.3, 112.3),
    "walker2d-medium-expert-v2": (110.1, 0.3, 111.2),
    "antmaze-umaze-v0": (93.4, 3.4, 96.0),
    "antmaze-umaze-diverse-v0": (66.2, 8.6, 84.0),
    "antmaze-medium-play-v0": (76.6, 10.8, 79.8),
    "antmaze-medium-diverse-v0": (78.6, 10.3, 82.0),
    "antmaze-large-play-v0": (46.4, 8.3, 49.0),
    "antmaze-large-diverse-v0": (56.6, 7.6, 61.7),
    "pen-human-v1": (72.8, 9.6, 75.7),
    "pen-cloned-v1": (57.3, 11.9, 60.8),
    "kitchen-complete-v0": (84.0, 7.4, 84.5),
    "kitchen-partial-v0": (60.5, 6.9, 63.7),
    "kitchen-mixed-v0": (62.6, 5.1, 66.6),
}
GROUPS = ("locomotion", "antmaze", "adroit", "kitchen")  # families of tasks
RULES = {
    "last": "last",
    "best": "online (best)",
    "offline": "offline",
    "offline_released": "offline, released index",
}
COLOURS = dict(zip(RULES, ("tab:gray", "tab:blue", "tab:orange", "tab:green")))
PUBLISHED_COLUMNS = ("offline", "offline_spread", "online")
RESAMPLES = 10_000


def group_of(task: str) -> str:
    return tasks.get(task).family


def kind_of(task: str, source: str, label: str) -> str:
    """What a row says of its data: "D4RL" for D4RL's own file, read as it is, alone."""
    return "REPAIRED" if source == "d4rl" and label != f"D4RL {task}" else source.upper()


# ---- Figures -------------------------------------------------------------------------------------


def common(job: Job) -> dict:
    """What makes a job's runs, whatever the seed: the config that its failure is recorded with."""
    config = without_free(next(iter(job.configs.values())))
    return {k: v for k, v in config.items() if k != "seed"}


def collect(jobs: list[Job]) -> list[dict]:
    """Every finished run of these jobs."""
    runs, date = [], re.compile(r"-(\d{4})(\d\d)(\d\d)-(\d\d)(\d\d)(\d\d)(-\d+)?$")
    for job in jobs:
        for seed, run in finished_runs(job).items():
            about, started = load(run / "config.json"), date.search(run.name)
            paths = ("out", "data")  # of one machine
            runs.append({
                "task": job.task,
                "seed": seed,
                "run": run.name,
                "started": "{}-{}-{} {}:{}:{}".format(*started.groups()) if started else None,
                "data": about["data"],
                "versions": about["versions"],
                "config": {k: v for k, v in about["config"].items() if k not in paths},
                "selection": load(run / "selection.json"),
            })  # fmt: skip
    return runs


def statistics(scores: list[float]) -> dict:
    """Mean, standard deviation over seeds, and the mean's 95 % interval by Student's t.

    The last two are None where there is one seed only.
    """
    (mean, std), n = mean_and_std(scores), len(scores)
    low = high = None
    if std is not None:
        half = float(scipy.stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    return {"scores": scores, "mean": mean, "std": std, "low": low, "high": high}


def make_rows(seeds: dict, runs: list[dict], failures: dict) -> list[dict]:
    """A row for each task and each data set that its seeds were trained on; one without scores
    for a task that has no finished run.

    seeds: task -> its seeds; failures: task -> why its job failed.
    """
    rows = []
    for task, wanted in seeds.items():
        of_task, sets = [r for r in runs if r["task"] == task], {}
        for run in of_task:
            data = run["data"]
            sets.setdefault((data["source"], data["label"], data["crc32"]), []).append(run)
        note = ""
        if not of_task or len(of_task) < len(wanted):
            note = f"{len(of_task)} of {len(wanted)} seeds finished"
            note = f"failed: {failures[task]}" if task in failures else note
        for (source, label, crc32), made in sorted(sets.items()) or [((None, None, None), [])]:
            scores = {rule: [r["selection"][rule]["score"] for r in made] for rule in RULES if made}
            rows.append({
                "task": task,
                "group": group_of(task),
                "kind": kind_of(task, source, label) if made else None,
                "data": label,
                "crc32": crc32,
                "seeds": [r["seed"] for r in made],
                "rules": {rule: statistics(of_rule) for rule, of_rule in scores.items()},
                "published": dict(zip(PUBLISHED_COLUMNS, PUBLISHED[task])),
                "note": note,
            })  # fmt: skip
    return rows


def iqm(scores: list[list[float]]) -> dict:
    """The interquartile mean of all runs of several tasks, and its 95 % interval by a bootstrap.

    scores: a list of runs for each task. The bootstrap is stratified: seeds are drawn again within
    each task. If some task has a single seed there is no interval.
    """
    value = float(scipy.stats.trim_mean(np.concatenate(scores), 0.25))
    if min(map(len, scores)) < 2:
        return {"iqm": value, "low": None, "high": None}
    rng, resampled = np.random.default_rng(0), []
    for of_task in scores:
        chosen = rng.integers(len(of_task), size=(RESAMPLES, len(of_task)))
        resampled.append(np.array(of_task)[chosen])
    iqms = scipy.stats.trim_mean(np.concatenate(resampled, axis=1), 0.25, axis=1)
    low, high = np.percentile(iqms, [2.5, 97.5])
    return {"iqm": value, "low": float(low), "high": float(high)}


def make_aggregates(rows: list[dict]) -> list[dict]:
    """For each kind of data, each group of tasks and all of them: the IQM under every rule, and of
    how many tasks it is."""
    aggregates = []
    for kind in sorted({row["kind"] for row in rows} - {None}):
        for group in (*GROUPS, "all"):
            chosen = [r for r in rows if r["kind"] == kind and group in (r["group"], "all")]
            if not chosen:
                continue
            scores = {rule: [r["rules"][rule]["scores"] for r in chosen] for rule in RULES}
            aggregates.append({
                "group": group,
                "kind": kind,
                "tasks": len({r["task"] for r in chosen}),
                "of": sum(group in (group_of(task), "all") for task in PUBLISHED),
                "runs": sum(len(r["seeds"]) for r in chosen),
                "rules": {rule: iqm(of_rule) for rule, of_rule in scores.items()},
            })  # fmt: skip
    return aggregates


# ---- Files ---------------------------------------------------------------------------------------


def interval(figures: dict) -> str:
    return "" if figures["low"] is None else f" [{figures['low']:.1f}, {figures['high']:.1f}]"


def shown(figures: dict | None) -> str:
    return mean_and_spread(figures["scores"]) + interval(figures) if figures else "–"


def described(aggregate: dict) -> str:
    n, of = aggregate["tasks"], aggregate["of"]
    return str(of) if n == of else f"{n} of {of} tasks"


def described_data(kind: str | None) -> str:
    return "–" if kind is None else kind if kind == "D4RL" else f"**{kind}**, not D4RL"


def markdown_table(head: list[str], lines: list[list]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    rows = [[str(text).replace("|", "\\|") for text in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def markdown(rows: list[dict], aggregates: list[dict], runs: list[dict], origin: dict) -> str:
    """The document d4rl.md."""

    def made(what):
        return ", ".join(sorted({run["versions"].get(what) or "unknown" for run in runs})) or "none"

    lines, groups = [], []
    for row in rows:
        paper, about = row["published"], [row["task"], described_data(row["kind"])]
        scores = [shown(row["rules"].get(rule)) for rule in RULES]
        published = [f"{paper['offline']} ± {paper['offline_spread']}", paper["online"]]
        lines.append([*about, len(row["seeds"]), *scores, *published, row["note"]])
    for a in aggregates:
        scores = [f"{figures['iqm']:.1f}{interval(figures)}" for figures in a["rules"].values()]
        groups.append([a["group"], described_data(a["kind"]), described(a), a["runs"], *scores])
    head = ["task", "data", "seeds", *RULES.values(), "paper, offline", "paper, online", ""]
    table, iqms = markdown_table(head, lines), "No task is finished yet."
    if groups:
        iqms = markdown_table(["group", "data", "tasks", "runs", *RULES.values()], groups)
    options = "none, the paper's recipes"
    if origin["options"]:
        options = f"`{' '.join(origin['options'])}`"
    labels = dict.fromkeys(row["data"] for row in rows if row["data"])
    return f"""# Diffusion-QL on D4RL's tasks

Written by `python -m experiments.d4rl` on {origin["date"]}. The runs: commit {made("commit")},
torch {made("torch")}, {made("device")}. Options of `dql.py`: {options}.

Normalised score, mean ± standard deviation over seeds [95 % interval of the mean, Student's t].
Selected: the last evaluation; the best, which the paper calls online; by BC loss, offline; and by
the released code's index, which chose the paper's offline column. **A score on data that are not
D4RL's is not a D4RL score**, whatever stands beside it.

{table}

Interquartile mean over the runs of a group's tasks [95 % interval, bootstrap stratified by task]:

{iqms}

Data:

{"".join(f"- {label}{chr(10)}" for label in labels) or "- none yet"}"""


def write_csv(rows: list[dict], path: Path) -> None:
    """A line for each row and rule."""
    about, figures = ("task", "group", "kind", "data"), ("mean", "std", "low", "high")
    paper = [f"paper_{name}" for name in PUBLISHED_COLUMNS]
    with saved(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*about, "rule", "seeds", *figures, *paper, "note"])
        for row in rows:
            first, last = [row[name] for name in about], [*row["published"].values(), row["note"]]
            for rule in RULES:
                found = [row["rules"].get(rule, {}).get(name) for name in figures]
                out.writerow([*first, rule, len(row["seeds"]), *found, *last])


def draw(rows: list[dict], origin: dict, path: Path) -> None:
    """A band a row: seeds as points, for each rule the mean and its interval, the published scores
    as diamonds."""
    figure = Figure(figsize=(8.5, 1.7 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        if i % 2:
            axes.axhspan(i - 0.5, i + 0.5, color="0.95", zorder=0)
        for j, (rule, figures) in enumerate(row["rules"].items()):
            y, scores, colour = i + 0.19 * (j - 1.5), figures["scores"], COLOURS[rule]
            axes.scatter(scores, [y] * len(scores), s=16, color=colour, alpha=0.4, linewidths=0)
            if figures["low"] is not None:
                axes.plot([figures["low"], figures["high"]], [y, y], color=colour, linewidth=1.6)
            axes.plot(figures["mean"], y, "|", color=colour, markersize=9, markeredgewidth=2)
        axes.plot(row["published"]["offline"], i, "D", color="black", markersize=5)
        axes.plot(row["published"]["online"], i, "D", color="black", fillstyle="none", markersize=6)
    for rule, name in RULES.items():
        axes.plot([], [], "o-", color=COLOURS[rule], markersize=4, label=name)
    axes.plot([], [], "D", color="black", markersize=5, label="paper, offline")
    axes.plot([], [], "D", color="black", fillstyle="none", markersize=6, label="paper, online")
    labels = []
    for row in rows:
        made = f"{row['kind']}, seeds: {len(row['seeds'])}" if row["kind"] else "nothing finished"
        labels.append(f"{row['task']}\n{made}")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    for tick, row in zip(axes.get_yticklabels(), rows):
        tick.set_color("black" if row["kind"] == "D4RL" else "tab:red" if row["kind"] else "0.6")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("normalised score: seeds, mean and its 95 % interval", fontsize=9)
    axes.grid(axis="x", alpha=0.4)
    figure.legend(loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    axes.set_title(f"Diffusion-QL, {origin['date']}; red: not D4RL's data", fontsize=9)
    with saved(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write(results: Path, jobs: list[Job], runs: list[dict], options: list[str]) -> list[dict]:
    """The four files in results. options: dql.py's. -> the rows

    Raises RunError if a file cannot be written.
    """
    failures = {}
    for job in jobs:
        failed = load(Path(job.folder) / "failed.json")
        if failed and failed["config"] == common(job):
            failures[job.task] = failed["reason"]
    rows = make_rows({job.task: list(job.configs) for job in jobs}, runs, failures)
    aggregates, origin = make_aggregates(rows), {**describe(), "options": options}
    content = {**origin, "rows": rows, "aggregates": aggregates, "runs": runs}
    save_json(results / "d4rl.json", content)
    with saved(results / "d4rl.md") as temporary:
        temporary.write_text(markdown(rows, aggregates, runs, origin), encoding="utf-8")
    write_csv(rows, results / "d4rl.csv")
    draw(rows, origin, results / "d4rl.png")
    return rows

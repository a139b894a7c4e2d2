"""How long the paper's antmaze-umaze run takes on generated data, by the trainer's own loop.

    python -m bench.training --full-run  # 1M updates and 20 evaluations

Figures: wall_s, seconds in all; updating_s, of updates; evaluating_s, of evaluations; each
evaluation's score, BC loss and seconds; and which checkpoints are selected.
"""

import time
from dataclasses import replace

from bench.timing import device_slug
from trainer.folder import save_json
from trainer.provenance import describe


def full_run(options) -> None:
    """Train in options.runs at options.precision; write full_run_DEVICE.json into options.out."""
    from trainer.loop import train  # only here: it imports the environments
    from trainer.options import recipe_options

    how = {"data": "generated", "out": str(options.runs), "precision": options.precision}
    config = replace(recipe_options("antmaze-umaze-v0"), **how)
    start = time.perf_counter()
    run = train(config)[0]
    wall = time.perf_counter() - start
    epochs = [r for r in run.records if r["kind"] == "epoch"]
    evaluations = run.evaluations()
    updating = sum(config.updates_per_epoch / r["updates_per_second"] for r in epochs)
    times = {
        "wall_s": round(wall, 1),
        "updating_s": round(updating, 1),
        "evaluating_s": round(sum(e["seconds"] for e in evaluations), 1),
    }
    reported = ("step", "score", "bc_loss", "seconds")
    found = {
        "env": config.env,
        "precision": config.precision,
        "updates": epochs[-1]["step"],
        **times,
        "evaluations": [{key: e[key] for key in reported} for e in evaluations],
        "selection": run.select(config.top_k),
    }
    where = describe()
    path = options.out / f"full_run_{device_slug(where)}.json"
    save_json(path, {**where, **found})
    print(times, f"last score {evaluations[-1]['score']:.1f}, in {path}")

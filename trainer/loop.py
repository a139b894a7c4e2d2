"""A run: train, evaluate, save, resume."""

import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tasks
from trainer.backends import choose_acting, choose_updates
from trainer.data import load_transitions
from trainer.evaluation import evaluate
from trainer.folder import RunError, RunFolder, restore, save_tensors
from trainer.options import Options, UserError
from trainer.provenance import describe
from trainer.scores import mean_and_spread
from trainer.setup import choose_device, make_agent

LOG_EVERY = 100  # updates between looks at the losses: the only times the host waits for the device
SAVE_SECONDS = 30  # a run killed at any moment loses at most this and one epoch


def train(options: Options) -> list[RunFolder]:
    """Train as options say, or continue options.resume, and print the scores of every selection
    rule. -> a RunFolder for each seed"""
    device = choose_device(options)
    task = tasks.get(options.env)
    if not options.resume:
        RunFolder.require_writable(options.out)
    dataset = tasks.load(
        task,
        options.data,
        seed=0,  # every seed of a run learns from the same data
        n_generated=options.n_generated,
        repair=options.repair_data,
        log=lambda line: print(line, flush=True),
    )
    # Each is the run that it would be alone, and can be resumed and evaluated alone.
    seeds = options.seeds or (options.seed,)
    each = [replace(options, seed=seed, seeds=(), resume=()) for seed in seeds]
    agents = [make_agent(o, task, device) for o in each]
    transitions = load_transitions(options, dataset, device)
    acting, updates = choose_acting(options, agents), choose_updates(options, agents, transitions)
    if options.resume:
        runs = _resume(options, agents, dataset.fingerprint())
    else:
        runs = _begin(each, agents, dataset)
    paths, label = [str(run.path) for run in runs], dataset.fingerprint()["label"]
    where = paths[0]
    if len(runs) > 1:
        where = f"{Path(options.out)}, a folder for each of seeds {' '.join(map(str, seeds))}"
    what = f"{options.algo} on {label}, {len(dataset):,} transitions, {device}"
    print(f"{what}; everything goes to {where}", flush=True)
    try:
        run_epochs(each, agents, updates, acting, task, label, runs)
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on with: python dql.py --resume {' '.join(paths)}")
        raise
    _print_scores([run.select(options.top_k) for run in runs], label)
    return runs


def _begin(each: list[Options], agents: list, dataset) -> list[RunFolder]:
    when, runs, where = time.strftime("%Y%m%d-%H%M%S"), [], describe()
    for options, agent in zip(each, agents):
        name = f"{options.env}-{options.algo}-{dataset.source}-seed{options.seed}-{when}"
        about = {"config": asdict(options), "data": dataset.fingerprint(), "versions": where}
        runs.append(RunFolder.create(options.out, name, about))
        save_tensors(runs[-1].path / "resume.safetensors", agent.state_dict())
    return runs


def _resume(options: Options, agents: list, data: dict) -> list[RunFolder]:
    runs = [RunFolder(path) for path in options.resume]
    for run, agent in zip(runs, agents):
        saved = run.config()["data"]
        if saved["crc32"] != data["crc32"]:
            what = f"{run.path} was trained on {saved['label']}, this is {data['label']}"
            raise RunError(f"{what}: not the same transitions")
        restore(agent, run.path / "resume.safetensors")
    steps = sorted({agent.step for agent in agents})
    if len(steps) > 1:
        stands = ", ".join(map(str, steps))
        raise RunError(f"these runs stand at different updates ({stands}): resume them one by one")
    for run in runs:
        run.rewind_log(*steps)
    print(f"resumed at update {steps[0]:,} of {options.epochs * options.updates_per_epoch:,}")
    return runs


def _print_scores(selections: list[dict], label: str) -> None:
    print(f"normalised scores, {label}:")
    for rule in selections[0]:
        chosen = [selection[rule] for selection in selections]
        scores = [c["score"] for c in chosen]
        if len(scores) == 1:
            print(f"  {rule:<17}{scores[0]:6.1f}   (update {chosen[0]['step']:,})")
        else:
            each = ", ".join(f"{score:.1f}" for score in scores)
            print(f"  {rule:<17}  {mean_and_spread(scores)}   ({each})")


def run_epochs(each, agents, updates, acting, task, label, runs) -> None:
    """Epochs of updates, and evaluations after every eval_every of them and after the last."""
    options = each[0]
    per_evaluation = options.eval_every * options.updates_per_epoch
    step, total = agents[0].step, options.epochs * options.updates_per_epoch
    saved_at = time.monotonic()
    how = dict(unit="update", desc=options.algo, dynamic_ncols=True, smoothing=0.05)
    with tqdm(total=total, initial=step, **how) as bar:
        while True:
            due = step > 0 and (step % per_evaluation == 0 or step == total)
            for o, agent, act, run in zip(each, agents, acting, runs):
                # A run killed during an evaluation finds it missing here, and makes it again.
                if due and all(e["step"] != step for e in run.evaluations()):
                    whose = f"seed {o.seed}, " if len(runs) > 1 else ""
                    evaluate_and_record(o, agent, act, task, label, run, whose)
            latest = [run.evaluations()[-1]["score"] for run in runs if run.evaluations()]
            if due and len(runs) > 1:
                scores = f"{mean_and_spread(latest)} over {len(runs)} seeds ({label})"
                tqdm.write(f"update {step:,}: score {scores}")
            if step == total:
                return
            started = time.monotonic()
            score = f"{np.mean(latest):.1f} on {label}" if latest else "none yet"
            set_rates(options, agents)
            losses = run_epoch(options, agents, updates, bar, score)
            step = agents[0].step
            rate = options.updates_per_epoch / (time.monotonic() - started)
            for run, means in zip(runs, losses):
                run.log("epoch", step, **means, updates_per_second=rate)
            evaluation_follows = step % per_evaluation == 0 or step == total
            if evaluation_follows or time.monotonic() - saved_at > SAVE_SECONDS:
                for agent, run in zip(agents, runs):
                    save_tensors(run.path / "resume.safetensors", agent.state_dict())
                saved_at = time.monotonic()


def set_rates(options: Options, agents: list) -> None:
    """Learning rates of the epoch to come: with a decay, a cosine to 0 over the run.

    The released code steps its cosine once per evaluation, 20 to 40 times in all, with the number
    of epochs as its period, so that its rates hardly decay.
    """
    periods = {"none": math.inf, "cosine": 1, "released": options.eval_every}[options.lr_decay]
    for agent in agents:
        epoch = agent.step // options.updates_per_epoch
        share = 0.5 * (1 + math.cos(math.pi * min(epoch // periods / options.epochs, 1)))
        agent.policy_optimizer.param_groups[0]["lr"] = share * options.lr
        agent.critic_optimizer.param_groups[0]["lr"] = share * options.critic_lr


def run_epoch(options: Options, agents, updates, bar, score: str) -> list[dict]:
    """updates_per_epoch updates of each agent -> for each the mean of every metric.

    Raises UserError when a metric is not finite.
    """
    sums, n_updates = [{} for _ in agents], options.updates_per_epoch
    for i in range(0, n_updates, LOG_EVERY):
        n = min(LOG_EVERY, n_updates - i)
        chunk = n if agents[0].device.type == "cuda" else 1  # on a CPU the bar shows every update
        windows = [{} for _ in agents]
        for _ in range(0, n, chunk):
            for window, means in zip(windows, updates.run(chunk)):
                window |= {k: window.get(k, 0.0) + v * chunk for k, v in means.items()}
            bar.update(chunk)
        for agent, window, total in zip(agents, windows, sums):
            window = {k: float(v) for k, v in window.items()}
            broken = [k for k, v in window.items() if not math.isfinite(v)]
            if broken:
                whose = f"seed {agent.seed}: " if len(agents) > 1 else ""
                between = f"between updates {agent.step - n:,} and {agent.step:,}"
                raise UserError(
                    f"{whose}{broken[0]} became {window[broken[0]]} {between}; the last good "
                    "checkpoint is kept: lower --lr or --eta, or raise --batch-size"
                )
            total |= {k: total.get(k, 0.0) + v for k, v in window.items()}
        shown = [k for k in ("bc_loss", "q_loss", "critic_loss") if k in sums[0]]
        means = {k: f"{np.mean([total[k] for total in sums]) / (i + n):.4g}" for k in shown}
        bar.set_postfix(**means, score=score, refresh=False)
    return [{k: v / n_updates for k, v in total.items()} for total in sums]


def evaluate_and_record(options: Options, agent, act, task, label, run, whose: str) -> None:
    """Evaluate, log, keep the networks, select, draw."""
    step, started = agent.step, time.monotonic()
    score, episodes = evaluate(act, task, options, options.eval_episodes, step, agent.device)
    seconds = time.monotonic() - started
    since = max([e["step"] for e in run.evaluations()], default=0)
    epochs = [r["bc_loss"] for r in run.records if r["kind"] == "epoch" and r["step"] > since]
    prefixes = tuple(f"{name}." for name in agent.networks())
    weights = {k: v for k, v in agent.state_dict().items() if k.startswith(prefixes)}
    save_tensors(run.checkpoint(step), weights, {"step": step, "score": score, "data": label})
    title = f"{options.env}, update {step:,}: score {score:.1f}\n{label}"
    task.draw(episodes, run.path / f"episodes_{step:08d}.png", title)
    run.log(
        "evaluation",
        step,
        score=score,
        bc_loss=float(np.mean(epochs)),
        mean_length=float(np.mean(episodes.lengths)),
        seconds=seconds,
        data=label,
    )
    run.select(options.top_k)
    run.draw_curve(f"{options.env}, {options.algo}\n{label}")
    n = f"{len(episodes.returns)} episodes in {seconds:.0f} s"
    tqdm.write(f"{whose}update {step:,}: score {score:.1f} ({label}), {n}")

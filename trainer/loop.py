"""A run: train, evaluate, save, resume."""

import math
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

import tasks
from trainer import interrupts
from trainer.backends import choose_acting, choose_threads, choose_updates
from trainer.data import load_transitions
from trainer.evaluation import evaluate, standard_error
from trainer.folder import RunError, RunFolder, restore, save_tensors
from trainer.options import Options, UserError
from trainer.provenance import describe
from trainer.scores import mean_and_spread
from trainer.setup import choose_device, make_agent
from trainer.terminal import command, decoration, progress, say

LOG_EVERY = 100  # updates between looks at a GPU's losses: the only times the host waits for it
FIRST_GOALS = 5_000  # updates of the quick recipe: experiments/results/learning_curves.json
SAVE_SECONDS = 30  # a run killed at any moment loses little more than this


def train(options: Options) -> list[RunFolder]:
    """Train as options say, or continue options.resume, and print the scores of every selection
    rule. -> a RunFolder for each seed"""
    device, task = choose_device(options), tasks.get(options.env)
    # Each is the run that it would be alone, and can be resumed and evaluated alone.
    seeds = options.seeds or (options.seed,)
    each = [replace(options, seed=seed, seeds=(), resume=()) for seed in seeds]
    with ExitStack() as claims:
        runs = [claims.enter_context(RunFolder(path).claimed()) for path in options.resume]
        try:
            if not runs:
                RunFolder.require_writable(options.out)
            dataset = _load(
                runs,
                task,
                _source(options, runs),
                seed=0,  # every seed of a run learns from the same data
                n_generated=options.n_generated,
                repair=options.repair_data,
                log=say,
            )
            transitions = load_transitions(options, dataset, device)
            training = Training(each, task, dataset, transitions, device, _threads(runs))
            if runs:
                training.resume(runs)
            else:
                with interrupts.held():
                    training.begin(runs)
                for run in runs:
                    claims.enter_context(run.claimed())
            training.run()
        except KeyboardInterrupt:
            paths = [run.path for run in runs]
            hint = f"go on with: {command('--resume', *paths)}" if paths else "no run was begun"
            say(f"\ninterrupted; {hint}")
            raise
        training.print_scores()
        say(f"evaluate it again, or film it, with: {command('--eval', runs[0].path)}")
    return runs


def _load(runs: list[RunFolder], *which, **how):
    try:
        return tasks.load(*which, **how)
    except tasks.TaskError as e:
        raise tasks.TaskError(f"{e}; if the run's data have moved: --data" if runs else e) from e


def _source(options: Options, runs: list[RunFolder]) -> str:
    """Where the data come from: on resuming, from where they came, not from what is there now."""
    if runs and options.data == "auto":
        return runs[0].config()["data"].get("source", "auto")
    return options.data


def _threads(runs: list[RunFolder]) -> int:
    threads = runs[0].config()["versions"].get("threads") if runs else None
    return threads if type(threads) is int else 0


class Training:
    """Runs that learn side by side from the same data, and differ in their seeds."""

    def __init__(self, each: list[Options], task, dataset, transitions, device, made_with=0):
        """made_with: how many threads the runs were made with that will be resumed."""
        self.each, self.task, self.dataset = each, task, dataset
        self.transitions, self.device, self.label = transitions, device, dataset.label
        options, self.runs = each[0], []
        self.agents = [make_agent(o, task, device) for o in each]
        choose_threads(options, self.agents, transitions, made_with)
        self.acting = choose_acting(options, self.agents)
        self.updates = choose_updates(options, self.agents, transitions)
        self.total = options.epochs * options.updates_per_epoch
        self.sums: list[dict] = [{} for _ in each]  # of each metric in the present epoch
        self.seconds, self.timed = 0.0, 0  # the time that this many of its updates took here
        self.losses: list[str] = []  # as the bar shows them

    def begin(self, runs: list[RunFolder]) -> None:
        """Make the runs' folders and append them to runs."""
        self.runs = runs
        options, when = self.each[0], time.strftime("%Y%m%d-%H%M%S")
        where = describe() | {"threads": torch.get_num_threads()}
        for o, agent in zip(self.each, self.agents):
            name = f"{o.env}-{o.algo}-{self.dataset.source}-seed{o.seed}-{when}"
            about = {"config": asdict(o), "data": self.dataset.fingerprint(), "versions": where}
            runs.append(RunFolder.create(o.out, name, about))
            save_tensors(runs[-1].path / "resume.safetensors", agent.state_dict())
        place = str(runs[0].path)
        if len(runs) > 1:
            seeds = " ".join(str(o.seed) for o in self.each)
            place = f"{Path(options.out)}, a folder for each of seeds {seeds}"
        what = f"{options.algo} on {self.label}, {len(self.dataset):,} transitions, {self.device}"
        say(f"{what}; everything goes to {place}")
        if self.device.type == "cpu" and self.total >= 100_000:
            say(f"{self.total:,} updates take hours on a CPU; --quick takes 15,000")

    def resume(self, runs: list[RunFolder]) -> None:
        """Restore runs; those that are behind, as after a kill between two saves, catch up."""
        crc32 = self.dataset.fingerprint()["crc32"]
        for run in runs:
            saved = run.config()["data"]
            if saved["crc32"] != crc32:
                what = f"{run.path} was trained on {saved.get('label')}, this is {self.label}"
                raise RunError(f"{what}: not the same transitions; give its own with --data")
        self.runs = runs
        self._restore()
        for run, options in zip(runs, self.each):
            run.keep_options(asdict(options))
        self._say_what_differs()
        step = max(agent.step for agent in self.agents)
        behind = [i for i, agent in enumerate(self.agents) if agent.step < step]
        for i in behind:
            data = self.dataset, self.transitions
            alone = Training([self.each[i]], self.task, *data, self.device, torch.get_num_threads())
            alone.runs = [runs[i]]
            alone._restore()
            alone.run(until=step)
        if behind:
            self._restore()
        say(f"resumed at update {step:,} of {self.total:,}")

    def _restore(self) -> None:
        for i, (run, agent) in enumerate(zip(self.runs, self.agents)):
            path = run.path / "resume.safetensors"
            self.sums[i] = sums = restore(agent, path).get("sums", {})
            numbers = type(sums) is dict and all(type(v) is float for v in sums.values())
            if not 0 <= agent.step <= self.total or not numbers:
                what = f"checkpoint {path} is of update {agent.step:,} and sums {sums!r:.40}"
                raise RunError(f"{what}, which a run of {self.total:,} does not have")
            run.rewind_log(agent.step)
            epochs = agent.step // self.each[i].updates_per_epoch
            if (n := sum(r["kind"] == "epoch" for r in run.records)) != epochs:
                what = f"{run.path / 'log.jsonl'} has {n} of the {epochs} epochs that were trained"
                raise RunError(f"{what}: restore it, or begin a new run")

    def _say_what_differs(self) -> None:
        """A line if rounding may differ from here on."""
        before = self.runs[0].config()["versions"]
        now = describe() | {"threads": torch.get_num_threads()}
        names = ["device", "torch"] + ["threads"] * (self.device.type == "cpu")
        other = [n for n in names if n in before and before[n] != now[n]]
        if other:
            changed = ", ".join(f"{name} {before[name]} -> {now[name]}" for name in other)
            say(f"not where it was made ({changed}): it goes on, but not bit for bit")

    def run(self, until: int | None = None) -> None:
        """Epochs of updates, and evaluations after every eval_every of them and after the last.

        until: the update to stop at, else the last one.
        """
        options, n = self.each[0], self.each[0].updates_per_epoch
        self.until = self.total if until is None else until
        self.saved_at = time.monotonic()
        how = dict(total=self.total, initial=self.agents[0].step, desc=options.algo, unit="")
        with progress(**how, unit_scale=True, smoothing=0.05, bar_format=BAR) as self.bar:
            while True:
                step = self.agents[0].step
                self.evaluate_what_is_due()
                self.show_losses()
                if step == self.until:
                    return
                set_rates(options, self.agents)
                with interrupts.held() as stop:
                    self.run_updates(min(self.until, (step // n + 1) * n), stop)
                    self.finish_epoch_and_save(stop)

    def evaluation_is_due(self) -> bool:
        """At the present update."""
        options, step = self.each[0], self.agents[0].step
        every = options.eval_every * options.updates_per_epoch
        return step > 0 and (step % every == 0 or step == self.total)

    def evaluate_what_is_due(self) -> None:
        if not self.evaluation_is_due():
            return
        step, several = self.agents[0].step, len(self.runs) > 1
        for options, agent, act, run in zip(self.each, self.agents, self.acting, self.runs):
            # A run killed during an evaluation finds it missing here, and makes it again.
            if all(e["step"] != step for e in run.evaluations()):
                whose = f"seed {options.seed}, " if several else ""
                evaluate_and_record(options, agent, act, self.task, self.label, run, whose)
        if several:
            scores = f"{mean_and_spread(self.latest_scores())} over {len(self.runs)} seeds"
            say(f"update {step:,}: score {scores} ({self.label})")

    def latest_scores(self) -> list[float]:
        return [run.evaluations()[-1]["score"] for run in self.runs if run.evaluations()]

    def run_updates(self, end: int, stop) -> None:
        """At least one update of the present epoch, and more up to number `end`, until a save is
        due or stop.number is set. Their metrics go into self.sums.

        Raises UserError when a metric is not finite.
        """
        options, started = self.each[0], time.monotonic()
        step = self.agents[0].step
        on_gpu = self.agents[0].device.type == "cuda"
        while True:
            done = step % options.updates_per_epoch
            # A CPU's losses cost no waiting: it can stop after each update.
            n = min(LOG_EVERY - done % LOG_EVERY, end - step) if on_gpu else 1
            for agent, total, means in zip(self.agents, self.sums, self.updates.run(n)):
                for name, mean in means.items():
                    value = float(mean)
                    if not math.isfinite(value):
                        raise UserError(self._broken(agent, name, value, step))
                    total[name] = total.get(name, 0.0) + n * value
            step += n
            self.timed += n
            self.bar.update(n)
            if step % LOG_EVERY == 0 or step == end:
                self.show_losses()
            if step == LOG_EVERY < options.updates_per_epoch:
                for run, means in zip(self.runs, self.means()):
                    run.log("first", step, **means)
            if step == end or stop.number or self.a_save_is_due():
                break
        self.seconds += time.monotonic() - started

    def _broken(self, agent, name: str, value: float, step: int) -> str:
        whose = f"seed {agent.seed}: " if len(self.agents) > 1 else ""
        between = f"between updates {step:,} and {agent.step:,}"
        todo = "lower --lr or --eta, or raise --batch-size"
        kept = f"the last good checkpoint is kept: {todo}"
        return f"{whose}{name} became {value} {between}; {kept}"

    def means(self) -> list[dict]:
        """Of every metric over the updates of the present epoch, for each run."""
        n = self.agents[0].step % self.each[0].updates_per_epoch or self.each[0].updates_per_epoch
        return [{name: total / n for name, total in sums.items()} for sums in self.sums]

    def show_losses(self) -> None:
        """In the bar: the means over seeds of BC loss and Q, and the last score."""
        means, latest = self.means(), self.latest_scores()
        shown = [("bc", "bc_loss", ".4f"), ("Q", "q_mean", ".1f")]
        if means[0]:
            self.losses = [
                f"{name} {np.mean([m[key] for m in means]):{how}}"
                for name, key, how in shown
                if key in means[0]
            ]
        score = [f"score {np.mean(latest):.1f}"] if latest else []
        self.bar.set_postfix_str(", ".join(self.losses + score), refresh=False)

    def a_save_is_due(self) -> bool:
        return time.monotonic() - self.saved_at > SAVE_SECONDS

    def finish_epoch_and_save(self, stop) -> None:
        """Log an epoch that is complete; save where it is time to, and before an evaluation."""
        options, step = self.each[0], self.agents[0].step
        complete = step % options.updates_per_epoch == 0
        if complete:
            rate = self.timed / max(self.seconds, 1e-9)
            for run, means in zip(self.runs, self.means()):
                run.log("epoch", step, **means, updates_per_second=rate)
            self.seconds, self.timed = 0.0, 0
        reached = self.evaluation_is_due() or step == self.until
        if reached or stop.number or self.a_save_is_due():
            for agent, run, sums in zip(self.agents, self.runs, self.sums):
                about = {} if complete else {"sums": sums}
                save_tensors(run.path / "resume.safetensors", agent.state_dict(), about)
            self.saved_at = time.monotonic()
        if complete:
            self.sums = [{} for _ in self.runs]

    def print_scores(self) -> None:
        """Of every selection rule."""
        selections = [run.select(options.top_k) for run, options in zip(self.runs, self.each)]
        say(f"normalised scores, {self.label}:")
        for rule in selections[0]:
            chosen = [selection[rule] for selection in selections]
            scores = [c["score"] for c in chosen]
            if len(scores) == 1:
                say(f"  {rule:<17}{scores[0]:6.1f}   (update {chosen[0]['step']:,})")
            else:
                each = ", ".join(f"{score:.1f}" for score in scores)
                say(f"  {rule:<17}  {mean_and_spread(scores)}   ({each})")


# Within 80 columns: share done, rate, time left, and what show_losses says.
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {rate_fmt} {remaining} left{postfix}"


def set_rates(options: Options, agents: list) -> None:
    """Learning rates of the epoch to come: with a decay, a cosine to 0 over decay_epochs.

    The released code steps its cosine once per evaluation, 20 to 40 times in all, with the number
    of epochs as its period, so that its rates hardly decay.
    """
    periods = {"none": math.inf, "cosine": 1, "released": options.eval_every}[options.lr_decay]
    for agent in agents:
        epoch = agent.step // options.updates_per_epoch
        last = options.decay_epochs or options.epochs
        share = 0.5 * (1 + math.cos(math.pi * min(epoch // periods / last, 1)))
        agent.policy_optimizer.param_groups[0]["lr"] = share * options.lr
        agent.critic_optimizer.param_groups[0]["lr"] = share * options.critic_lr


def evaluate_and_record(options: Options, agent, act, task, label, run, whose: str) -> None:
    """Evaluate, keep the networks, draw, log, select."""
    step, started = agent.step, time.monotonic()
    score, episodes = evaluate(act, task, options, options.eval_episodes, step, agent.device)
    seconds = time.monotonic() - started
    since = max([e["step"] for e in run.evaluations()], default=0)
    epochs = [r["bc_loss"] for r in run.records if r["kind"] == "epoch" and r["step"] > since]
    prefixes = tuple(f"{name}." for name in agent.networks())
    weights = {k: v for k, v in agent.state_dict().items() if k.startswith(prefixes)}
    save_tensors(run.checkpoint(step), weights, {"step": step, "score": score, "data": label})
    n = f"{len(episodes.returns)} episodes in {seconds:.0f} s"
    say(f"{whose}update {step:,}: score {score:.1f} ({label}), {n}")
    if score == 0 and task.family == "antmaze" and step < FIRST_GOALS:
        say(f"which is usual in a maze: first goals are reached after some {FIRST_GOALS:,} updates")
    with decoration("the picture of the episodes"):
        title = f"{options.env}, update {step:,}: score {score:.1f}\n{label}"
        task.draw(episodes, run.picture(step), title)
    run.log(
        "evaluation",
        step,
        score=score,
        standard_error=standard_error(task, episodes),
        bc_loss=float(np.mean(epochs)),
        mean_length=float(np.mean(episodes.lengths)),
        seconds=seconds,
        data=label,
    )
    run.select(options.top_k)
    with decoration("the learning curve's picture"):
        run.draw_curve(f"{options.env}, {options.algo}\n{label}")

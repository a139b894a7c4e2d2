"""Scores: evaluations during training, and of a finished run (--eval)."""

import math

import numpy as np
import torch

import tasks
from trainer.backends import choose_acting
from trainer.folder import RunFolder, restore
from trainer.options import Options, UserError
from trainer.setup import choose_device, make_agent
from trainer.terminal import decoration, progress, say


def evaluate(act, task, options: Options, n_episodes: int, step: int, device):
    """n_episodes at once, one batched act() a step. act: (states, generator) -> actions, as
    choose_acting() makes it. -> (normalised score, tasks.Episodes)

    Its randomness is its own, a function of the run's seed and the step: evaluating or not does not
    change the training. Raises UserError if Q is not finite or a precision cannot hold the weights.
    """
    seed = 1_000_003 * options.seed + step
    generator = torch.Generator(device).manual_seed(seed)
    bar = progress(total=task.episode_limit, desc="evaluating", unit="step", leave=False)

    def on_step(t, n_alive):
        bar.update()
        bar.set_postfix(episodes_running=n_alive, refresh=False)

    def acted(states):
        try:
            return act(states, generator)
        except (RuntimeError, ValueError) as e:
            said = str(e)
            if "cannot hold" in said:  # what the kernels say of weights
                raise UserError(f"at update {step:,} {e}: take --precision tf32 or fp32") from e
            # What torch.multinomial and the kernels say.
            if "probability tensor" not in said and "NaN" not in said:
                raise
            what = f"Q(s, a) is not finite at update {step:,}: the run has diverged"
            raise UserError(f"{what}; lower --lr or --eta") from e

    with bar:
        threads = options.threads or None
        episodes = task.evaluate(acted, n_episodes, seed, n_threads=threads, on_step=on_step)
    return float(np.mean(task.normalized_score(episodes.returns))), episodes


def standard_error(task, episodes) -> float | None:
    """Of the mean normalised score; None of a single episode."""
    scores = task.normalized_score(episodes.returns)
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores))) if len(scores) > 1 else None


def load_run(folder: str, options: Options):
    """-> a run, its task, its agent with the weights that --which chooses, and what
    selection.json says of them"""
    run, task = RunFolder(folder), tasks.get(options.env)
    chosen = run.selection(options.which)
    agent = make_agent(options, task, choose_device(options))
    restore(agent, run.path / chosen["checkpoint"], weights_only=True)
    return run, task, agent, chosen


def evaluate_run(options: Options) -> None:
    """--eval: evaluate a run's chosen checkpoint, draw the episodes, film one if asked."""
    run, task, agent, chosen = load_run(options.eval, options)
    [act] = choose_acting(options, [agent])
    n = options.episodes or options.eval_episodes
    score, episodes = evaluate(act, task, options, n, chosen["step"] + 1, agent.device)
    title = f"{options.env}, {options.which} (update {chosen['step']:,}): score {score:.1f}"
    error = standard_error(task, episodes)
    spread = "one episode" if error is None else f"standard error of {n} episodes"
    say(f"{title}{'' if error is None else f' ± {error:.1f}'} ({spread}; {chosen['data']})")
    with decoration("the picture of the episodes"):
        picture = run.path / f"episodes_eval_{options.which}.png"
        task.draw(episodes, picture, f"{title}\n{chosen['data']}")
        say(f"picture in {picture}")
    if options.render:
        generator = torch.Generator(agent.device).manual_seed(options.seed)
        film = options.env, lambda state: act(state, generator), options.render, options.seed
        say(f"filmed one episode with return {tasks.film(*film):.1f}: {options.render}")

"""A task's data set as dql.Transitions, its rewards tuned as the recipe says."""

import numpy as np

from dql import Transitions
from trainer.options import Options, UserError


def tune_rewards(rewards, how, *, terminals=None, observations=None, next_observations=None):
    """The paper's reward transformations: (N,) -> (N,) float32. ValueError for an unknown name."""
    if how == "none":
        return rewards
    if how == "cql":
        return (rewards - 0.5) * 4
    if how == "sparse":  # not the paper's: as far apart as cql's, to 1 %, without its -2 a step
        return rewards * 200
    if how == "normalize":
        return (rewards - rewards.mean()) / rewards.std()
    if how == "iql_antmaze":
        return rewards - 1
    if how == "antmaze":
        return (rewards - 0.25) * 2
    if how == "iql_locomotion":
        # A trajectory ends where the next row does not continue it.
        ends = terminals.copy()
        ends[:-1] |= np.abs(observations[1:] - next_observations[:-1]).max(axis=1) > 1e-6
        starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
        returns = np.add.reduceat(rewards.astype(np.float64), starts)
        return (rewards / (returns.max() - returns.min()) * 1000).astype(np.float32)
    known = "none, cql, sparse, normalize, iql_antmaze, antmaze, iql_locomotion"
    raise ValueError(f"unknown reward_tune {how!r}; known: {known}")


def load_transitions(options: Options, dataset, device) -> Transitions:
    """Raises UserError where the tuned rewards would not be finite."""
    with np.errstate(divide="ignore", invalid="ignore"):  # looked at below
        rewards = tune_rewards(
            dataset.rewards,
            options.reward_tune,
            terminals=dataset.terminals,
            observations=dataset.observations,
            next_observations=dataset.next_observations,
        )
    if not np.isfinite(rewards).all():  # all rewards, or all trajectories' returns, are the same
        what = f"--reward-tune {options.reward_tune} divides by 0 on {dataset.label}"
        raise UserError(f"{what}; take another, or none")
    columns = dataset.observations, dataset.actions, dataset.next_observations
    return Transitions(*columns, rewards, dataset.terminals, device=device)

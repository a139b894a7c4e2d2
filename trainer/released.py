"""Checkpoints of the authors' released code, as agents."""

from pathlib import Path

import torch

from dql import DiffusionQL, beta_schedule

SCHEDULES = ("vp", "linear", "cosine")


def load_released_checkpoint(directory, id=None, *, max_action=1.0, **how) -> DiffusionQL:
    """An agent with the networks of actor_{id}.pth and critic_{id}.pth (actor.pth, critic.pth
    without id), as the authors' code saves them.

    Sizes, T and the schedule are read from the files. max_action, device and hyperparameters are
    not in them and are given as to DiffusionQL; the averages are not in them either and start as
    copies of the networks. Only tensors are unpickled, never code. Raises ValueError, in one line,
    for a file that is missing, broken, holds more than tensors, or is of another network.
    """
    suffix = ".pth" if id is None else f"_{id}.pth"
    files = {name: Path(directory) / f"{name}{suffix}" for name in ("actor", "critic")}
    saved = {name: _load(path) for name, path in files.items()}
    actor, critic = saved["actor"], saved["critic"]
    try:
        betas, first = actor["betas"], actor["model.mid_layer.0.weight"]
        action_dim = len(actor["model.final_layer.bias"])
        inputs = critic["q1_model.0.weight"].shape[1]
        n_timesteps, hidden_dim = len(betas), len(first)
    except KeyError as e:
        what = f"{files['actor'].parent} holds no networks of the authors' code"
        raise ValueError(f"{what}: {e} is missing") from None
    except (IndexError, TypeError):  # a vector where a matrix should be, or a number
        what = f"{files['actor'].parent} holds no networks of the authors' code"
        raise ValueError(f"{what}: betas or weights have another shape") from None
    how |= {"n_timesteps": n_timesteps, "schedule": _schedule(betas, files["actor"])}
    how |= {"hidden_dim": hidden_dim, "max_action": max_action}
    agent = DiffusionQL(inputs - action_dim, action_dim, **how)
    model = {k.removeprefix("model."): v for k, v in actor.items() if k.startswith("model.")}
    for module, state, path in (
        (agent.policy, model, files["actor"]),
        (agent.policy_ema, model, files["actor"]),
        (agent.critic, critic, files["critic"]),
        (agent.critic_target, critic, files["critic"]),
    ):
        try:
            module.load_state_dict(state)
        except RuntimeError as e:
            why = str(e).splitlines()[-1].strip()
            raise ValueError(f"{path} is of another network: {why}") from None
    return agent


def _load(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        hint = "the authors' code saves actor_ID.pth and critic_ID.pth"
        raise ValueError(f"there is no {path}; {hint}") from None
    except Exception as e:  # of many kinds, as pickles break in many ways
        why = f"({type(e).__name__}); nothing in it was run"
        raise ValueError(f"{path} cannot be read as tensors alone {why}") from e
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{path} holds no state_dict of tensors")
    return state


def _schedule(betas: torch.Tensor, path: Path) -> str:
    for name in SCHEDULES:
        if torch.allclose(beta_schedule(name, len(betas)).float(), betas.float(), atol=1e-6):
            return name
    raise ValueError(f"the betas in {path} are of none of the schedules {', '.join(SCHEDULES)}")

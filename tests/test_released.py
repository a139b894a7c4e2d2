"""trainer/released.py: the authors' checkpoints, from files made of the oracle's networks."""

from pathlib import Path

import pytest
import torch

from dql import Batch, beta_schedule
from trainer.released import load_released_checkpoint

NOISE_ERROR, CHAIN_ERROR = 2 * 1.7e-6, 2 * 9e-6  # twice the released float32 code's own error
CHAINS = {"vp": ("chain_vp_T5_a1.0", 5), "cosine": ("chain_cosine_T10_a1.0", 10)}


def error(ours, expected) -> float:
    return (ours.detach().double() - expected).abs().max().item()


def vector(module):
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def save_as_released(folder, oracle, schedule="vp", T=5, id=3, **other):
    """The oracle's networks in files as the authors' code writes them: the schedule's buffers beside the model's parameters."""
    betas = beta_schedule(schedule, T).float()
    actor = {"betas": betas, "alphas_cumprod": torch.cumprod(1 - betas, 0)}
    actor |= {f"model.{name}": value for name, value in oracle.named("params/actor/").items()}
    torch.save(actor | other, folder / f"actor_{id}.pth")
    torch.save(oracle.named("params/critic/"), folder / f"critic_{id}.pth")


@pytest.mark.parametrize("schedule", CHAINS)
def test_released_checkpoints_act_as_the_released_code_does(oracle, tmp_path, schedule):
    chain, T = CHAINS[schedule]
    save_as_released(tmp_path, oracle, schedule, T)
    agent = load_released_checkpoint(tmp_path, 3, eta=0.5)
    assert (agent.policy.schedule, agent.policy.n_timesteps, agent.config.eta) == (schedule, T, 0.5)
    action = agent.policy.sample(
        oracle["in/state"], x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"]
    )
    assert error(action, oracle[f"out/{chain}/action"]) < CHAIN_ERROR
    assert (
        error(
            torch.min(*agent.critic_target(oracle["in/state"], oracle["in/action"])),
            oracle["out/qmin"],
        )
        < NOISE_ERROR
    )
    assert agent.act(oracle["in/state"][0].numpy()).shape == (8,)
    before = vector(agent.policy)
    agent.update([oracle[f"in/{name}"] for name in Batch._fields])  # and it can be trained on
    assert not torch.equal(vector(agent.policy), before) and torch.equal(
        vector(agent.policy_ema), before
    )


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_checkpoints_that_are_none_of_the_authors_are_refused_in_a_line(
    oracle, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no .*actor_3.pth"):
        load_released_checkpoint(tmp_path, 3)
    save_as_released(tmp_path, oracle, other=torch.zeros(2))
    load_released_checkpoint(
        tmp_path, 3
    )  # the authors' buffers are many: what is not of the model is not looked at
    wrong = {
        "there is no .*critic.pth": lambda: (
            save_as_released(tmp_path, oracle) or torch.save({}, tmp_path / "actor.pth")
        ),
        "another network: .*extra": lambda: save_as_released(
            tmp_path, oracle, **{"model.extra": torch.zeros(2)}
        ),
        "another network: .*size mismatch": lambda: save_as_released(
            tmp_path, oracle, **{"model.mid_layer.2.bias": torch.zeros(2)}
        ),
        "none of the schedules": lambda: save_as_released(
            tmp_path, oracle, betas=torch.full((5,), 0.3)
        ),
        "no state_dict of tensors": lambda: torch.save([1, 2], tmp_path / "actor_3.pth"),
        "'betas' is missing": lambda: torch.save(
            {"weight": torch.zeros(2)}, tmp_path / "actor_3.pth"
        ),
        "cannot be read as tensors alone .*nothing in it was run": lambda: torch.save(
            {"betas": Code()}, tmp_path / "actor_3.pth"
        ),
        "actor_3.pth cannot be read": lambda: (tmp_path / "actor_3.pth").write_bytes(b"no pickle"),
    }
    for message, make in wrong.items():
        make()
        with pytest.raises(ValueError, match=message) as e:
            load_released_checkpoint(tmp_path, None if "critic.pth" in message else 3)
        assert "\n" not in str(e.value)
    assert not Path("was_run").exists()

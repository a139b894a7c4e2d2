"""trainer/released.py: the authors' checkpoints, from files made of the oracle's networks."""

from pathlib import Path

import pytest
import torch
from small_agents import CHAIN_ERROR, CHAINS, NOISE_ERROR, error, oracle_batch, vector

from dql import beta_schedule
from trainer.released import load_released_checkpoint


def save_as_released(folder, oracle, schedule="vp", T=5, id=3, **other):
    """The oracle's networks in files as the authors' code writes them.

    The schedule's buffers lie beside the model's parameters.
    """
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
    noise = dict(x_T=oracle[f"in/{chain}/xT"], noises=oracle[f"in/{chain}/eps"])
    action = agent.policy.sample(oracle["in/state"], **noise)
    assert error(action, oracle[f"out/{chain}/action"]) < CHAIN_ERROR
    q = torch.min(*agent.critic_target(oracle["in/state"], oracle["in/action"]))
    assert error(q, oracle["out/qmin"]) < NOISE_ERROR
    assert agent.act(oracle["in/state"][0].numpy()).shape == (8,)
    before = vector(agent.policy)
    agent.update(oracle_batch(oracle))  # it can be trained further
    assert not torch.equal(vector(agent.policy), before)
    assert torch.equal(vector(agent.policy_ema), before)


def save_flat_critic(folder):
    path = folder / "critic_3.pth"
    torch.save({name: value.flatten() for name, value in torch.load(path).items()}, path)


class Code:
    def __reduce__(self):
        return (Path.touch, (Path("was_run"),))


def test_files_that_are_not_the_authors_are_refused(oracle, tmp_path, monkeypatch):
    """In one line, and nothing in them is run."""
    monkeypatch.chdir(tmp_path)
    actor = tmp_path / "actor_3.pth"

    def save(**other):
        save_as_released(tmp_path, oracle, **other)

    def actor_without_critic():
        save()
        torch.save({}, tmp_path / "actor.pth")

    with pytest.raises(ValueError, match="there is no .*actor_3.pth"):
        load_released_checkpoint(tmp_path, 3)
    save(other=torch.zeros(2))
    load_released_checkpoint(tmp_path, 3)  # buffers that are not of the model are not looked at
    two, code = torch.zeros(2), {"betas": Code()}
    wrong = {
        "there is no .*critic.pth": actor_without_critic,
        "another network: .*extra": lambda: save(**{"model.extra": two}),
        "another network: .*size mismatch": lambda: save(**{"model.mid_layer.2.bias": two}),
        "none of the schedules": lambda: save(betas=torch.full((5,), 0.3)),
        "have another shape": lambda: save(betas=torch.tensor(0.3)),
        "weights have another shape": lambda: save_flat_critic(tmp_path),
        "no state_dict of tensors": lambda: torch.save([1, 2], actor),
        "'betas' is missing": lambda: torch.save({"weight": two}, actor),
        "cannot be read as tensors alone .*nothing in it was run": lambda: torch.save(code, actor),
        "actor_3.pth cannot be read": lambda: actor.write_bytes(b"no pickle"),
    }
    for message, make in wrong.items():
        make()
        with pytest.raises(ValueError, match=message) as e:
            load_released_checkpoint(tmp_path, None if "critic.pth" in message else 3)
        assert "\n" not in str(e.value)
    assert not Path("was_run").exists()

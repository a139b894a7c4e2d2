"""trainer/export.py: an exported policy acts as the agent does, in a process without this project.

The .json says enough to rebuild it by hand. The command --export is in test_evaluation.py.
"""

import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import dql
from trainer import folder
from trainer.export import export_policy

FACTS = {"task": "antmaze-umaze-v0", "data": "a test", "score": 50.0, "step": 7}
FACTS["order"] = ["x", "y"]


def make_agent(*sizes, gain=2.0, algo="ql", **how):
    """Weights are `gain` times the usual: states and candidates then lead to different actions."""
    make = {"ql": dql.DiffusionQL, "bc": dql.DiffusionBC}[algo]
    agent = make(*sizes, **how)
    with torch.no_grad():
        for network in (agent.policy, agent.critic_target):
            for p in network.parameters():
                p *= gain
    return agent


def small_agent():
    return make_agent(3, 2, hidden_dim=16, n_timesteps=1, algo="bc")


def make_inputs(policy, n_states, n=1, seed=0):
    """By the names of the program's inputs. n: candidates of each state."""
    g = torch.Generator().manual_seed(seed)
    rows, A = n_states * n, policy.action_dim
    inputs = {
        "state": torch.randn(n_states, policy.state_dim, generator=g),
        "x_T": torch.randn(rows, A, generator=g),
        "noises": torch.randn(policy.n_timesteps, rows, A, generator=g),
    }
    if n > 1:
        inputs["gumbel"] = -torch.empty(n_states, n).exponential_(generator=g).log()
    return inputs


@torch.no_grad()
def expected(agent, state, x_T, noises, gumbel=None):
    """The agent's own actions."""
    candidates = agent.policy.sample(state, x_T=x_T, noises=noises)
    if gumbel is None:
        return candidates
    q = torch.minimum(*agent.critic_target(state, candidates)).view_as(gumbel)
    return candidates.view(*gumbel.shape, -1)[torch.arange(len(state)), (q + gumbel).argmax(1)]


def exported(agent, folder, n=50):
    """-> the path of the .pt2 and its program, loaded"""
    path = folder / "policy.pt2"
    written = export_policy(agent, path, n_candidates=n, facts=FACTS)
    assert written == [path, path.with_suffix(".safetensors"), path.with_suffix(".json")]
    return path, torch.export.load(path).module()


@pytest.fixture(scope="module")
def antmaze(tmp_path_factory):
    """An agent of the antmazes' sizes, best of 50: (agent, path, program)."""
    agent = make_agent(29, 8)
    return agent, *exported(agent, tmp_path_factory.mktemp("antmaze"))


@pytest.fixture(scope="module")
def cloned(tmp_path_factory):
    how = dict(hidden_dim=16, n_timesteps=3, schedule="cosine", max_action=3.0)
    agent = make_agent(11, 3, algo="bc", **how)
    return agent, *exported(agent, tmp_path_factory.mktemp("cloned"))


STRANGER = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file, save_file
assert not any(importlib.util.find_spec(name) for name in ("dql", "trainer", "kernels"))
for name in sys.argv[2:]:
    act = torch.export.load(f"{name}.pt2").module()
    about = json.load(open(f"{name}.json"))
    inputs, actions = load_file(f"{name}_inputs.safetensors"), {}
    for B in sys.argv[1].split():
        actions[B] = act(*(inputs[f"{B}.{k}"] for k in about["inputs"]))
        assert not actions[B].requires_grad
    scope = {}
    exec("\\n".join(about["usage"]), scope)
    actions["usage"], actions["noise"] = scope["action"], scope["noise"]
    actions |= {k: scope[k] for k in ("state", "gumbel") if k in scope}
    save_file(actions, f"{name}_actions.safetensors")
"""


def test_a_process_without_this_project_acts_as_the_agent(antmaze, cloned, tmp_path):
    # Numbers of states. 1 and 2 are special to torch.export, 2 is the example's, and the agent
    # takes 25 states of 50 candidates in several pieces.
    numbers, cases = (1, 2, 3, 25), {"antmaze": (*antmaze, 50), "cloned": (*cloned, 1)}
    for name, (agent, path, _, n) in cases.items():
        for file in path.parent.iterdir():
            (tmp_path / f"{name}{file.suffix}").write_bytes(file.read_bytes())
        usage = tmp_path / f"{name}.json"
        usage.write_text(usage.read_text().replace("policy.pt2", f"{name}.pt2"))
        inputs = {}
        for B in numbers:
            of_b = make_inputs(agent.policy, B, n, seed=B)
            inputs |= {f"{B}.{k}": v for k, v in of_b.items()}
        save_file(inputs, tmp_path / f"{name}_inputs.safetensors")
    command = [sys.executable, "-I", "-c", STRANGER, " ".join(map(str, numbers)), *cases]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert ended.returncode == 0, ended.stderr
    for name, (agent, _, _, n) in cases.items():
        found = load_file(tmp_path / f"{name}_actions.safetensors")
        for B in numbers:
            inputs = make_inputs(agent.policy, B, n, seed=B)
            torch.testing.assert_close(found[str(B)], expected(agent, **inputs))
        state, noise = found.get("state", torch.zeros(1, agent.policy.state_dim)), found["noise"]
        action = expected(agent, state, noise[0], noise[1:], found.get("gumbel"))
        torch.testing.assert_close(found["usage"], action)


def test_a_states_action_does_not_depend_on_the_others(antmaze):
    agent, _, act = antmaze
    n = 50
    inputs, others = (make_inputs(agent.policy, 4, n, seed) for seed in (0, 1))
    together = act(*inputs.values())
    for b in range(4):
        row, rows = slice(b, b + 1), slice(b * n, (b + 1) * n)
        place = {"state": (row,), "x_T": (rows,), "noises": (slice(None), rows), "gumbel": (row,)}
        mixed = {k: v.clone() for k, v in others.items()}
        for k, where in place.items():
            mixed[k][where] = inputs[k][where]
        torch.testing.assert_close(act(*mixed.values())[b], together[b])
        alone = act(*(inputs[k][where] for k, where in place.items()))
        torch.testing.assert_close(alone[0], together[b])
        assert (act(*others.values())[b] - together[b]).abs().max() > 0.01


def test_choices_follow_the_softmax_of_the_smaller_q(tmp_path):
    """Over many draws of Gumbel noise."""
    n, draws = 5, 20_000
    # max_action: bounds that no candidate meets
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=1, max_action=30.0)
    state, x_T, noises, _ = make_inputs(agent.policy, 1, n).values()
    candidates = agent.policy.sample(state, x_T=x_T, noises=noises).detach()
    # Scale both critics alike, so that each is the smaller one somewhere.
    with torch.no_grad():
        for head in (agent.critic_target.q1_model, agent.critic_target.q2_model):
            q = head(torch.cat([state.repeat(n, 1), candidates], 1))
            head[-1].weight /= q.std()
            head[-1].bias.sub_(q.mean()).div_(q.std())
    q1, q2 = (q[:, 0] for q in agent.critic_target(state, candidates))
    _, act = exported(agent, tmp_path, n)
    gumbel = make_inputs(agent.policy, draws, n, seed=1)["gumbel"]
    repeated = state.repeat(draws, 1), x_T.repeat(draws, 1), noises.repeat(1, draws, 1)
    actions = act(*repeated, gumbel)
    chosen = torch.cdist(actions, candidates).argmin(1)
    torch.testing.assert_close(actions, candidates[chosen])
    counts = chosen.bincount(minlength=n)

    def chi_square(q):
        share = draws * torch.softmax(q, 0)
        return float(((counts - share) ** 2 / share).sum())

    assert chi_square(torch.minimum(q1, q2)) < 18.5  # 4 degrees of freedom, p = 0.001
    for wrong in (q1, q2, torch.maximum(q1, q2), (q1 + q2) / 2, torch.zeros(n)):
        assert chi_square(wrong) > 100


def by_hand(about, weights, state, x_T, noises, gumbel=None):
    """The actions in numpy and float64, from the .json and the .safetensors alone."""
    w = {k: v.numpy().astype(np.float64) for k, v in weights.items()}
    state, x_T, noises = (x.numpy().astype(np.float64) for x in (state, x_T, noises))
    T, n, m = (about[k] for k in ("n_timesteps", "n_candidates", "max_action"))
    beta = np.array(about["betas"])

    def linear(x, layer):
        return x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]

    def mish(x):
        return x * np.tanh(np.log1p(np.exp(x)))

    def network(x, *layers):
        """Mish between the layers, none after the last."""
        for layer in layers[:-1]:
            x = mish(linear(x, layer))
        return linear(x, layers[-1])

    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(8) / 7)
    waves = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    time = network(waves, "policy.time_mlp.1", "policy.time_mlp.3")
    denoiser = [f"policy.mid_layer.{i}" for i in (0, 2, 4)] + ["policy.final_layer"]
    s = state.repeat(n, 0)
    alpha, bar = 1 - beta, np.cumprod(1 - beta)
    prev = np.concatenate([[1.0], bar[:-1]])
    a = x_T
    for k in range(T):
        t = T - 1 - k
        eps = network(np.concatenate([a, time[[t]].repeat(len(a), 0), s], 1), *denoiser)
        x0 = np.clip(np.sqrt(1 / bar[t]) * a - np.sqrt(1 / bar[t] - 1) * eps, -m, m)
        a = (beta[t] * np.sqrt(prev[t]) * x0 + (1 - prev[t]) * np.sqrt(alpha[t]) * a) / (1 - bar[t])
        if t > 0:
            a = a + np.sqrt(beta[t] * (1 - prev[t]) / (1 - bar[t])) * noises[k]
    a = np.clip(a, -m, m)
    if gumbel is None:
        return a
    q = []
    for critic in ("critic_target.q1_model", "critic_target.q2_model"):
        layers = [f"{critic}.{i}" for i in (0, 2, 4, 6)]
        q.append(network(np.concatenate([s, a], 1), *layers))
    best = (np.minimum(*q).reshape(-1, n) + gumbel.numpy()).argmax(1)
    return a.reshape(-1, n, a.shape[1])[np.arange(len(state)), best]


@pytest.mark.parametrize("which", ["antmaze", "cloned"])
def test_a_policy_can_be_rebuilt_by_hand(which, request):
    """From the .json and the .safetensors."""
    agent, path, act = request.getfixturevalue(which)
    about = json.loads(path.with_suffix(".json").read_text())
    weights, policy = load_file(path.with_suffix(".safetensors")), agent.policy
    names = {f"policy.{k}" for k in policy.state_dict()}
    if agent.algo == "ql":
        names |= {f"critic_target.{k}" for k in agent.critic_target.state_dict()}
    assert weights.keys() == names
    assert about["facts"] == FACTS and about["algo"] == agent.algo
    assert about["schedule"] == policy.schedule
    assert about["hidden_dim"] == len(weights["policy.mid_layer.0.weight"])
    betas = dql.beta_schedule(policy.schedule, policy.n_timesteps)
    np.testing.assert_allclose(about["betas"], betas, rtol=1e-6)

    n = about["n_candidates"]
    inputs = make_inputs(policy, 6, n)
    assert list(about["inputs"]) == list(inputs)
    actions = act(*inputs.values())
    sizes = {"B": 6, f"{n}*B": 6 * n}
    shapes = (about["inputs"] | about["outputs"]).items()
    stated = {k: [sizes.get(size, size) for size in shape] for k, shape in shapes}
    assert stated == {k: list(x.shape) for k, x in (inputs | {"action": actions}).items()}
    np.testing.assert_allclose(actions.numpy(), by_hand(about, weights, **inputs), atol=1e-5)


def test_one_candidate_is_a_plain_sample_as_the_agent_acts(tmp_path):
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=2)
    path, act = exported(agent, tmp_path, 1)
    inputs = make_inputs(agent.policy, 3)
    assert list(json.loads(path.with_suffix(".json").read_text())["inputs"]) == list(inputs)
    torch.testing.assert_close(act(*inputs.values()), expected(agent, **inputs))


def test_a_program_holds_the_weights_once_and_no_code(antmaze):
    """And nothing of the machine that it was made on."""
    agent, path, _ = antmaze
    parameters = [*agent.policy.parameters(), *agent.critic_target.parameters()]
    floats = 4 * sum(p.numel() for p in parameters)
    assert floats < path.stat().st_size < 1.2 * floats
    assert floats < path.with_suffix(".safetensors").stat().st_size < 1.01 * floats
    with zipfile.ZipFile(path) as archive:
        files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}

    def is_pickle(name):
        return zipfile.is_zipfile(io.BytesIO(files[name])) or "custom_obj" in name

    pickles = list(filter(is_pickle, files))
    assert pickles == ["data/sample_inputs/model.pt"]
    arguments, named = torch.load(io.BytesIO(files[pickles[0]]), weights_only=True)
    assert len(arguments) == 4 and not named and not any(x.any() for x in arguments)
    graph = files["models/model.json"].decode()
    assert json.loads(graph) and ".py" not in graph and str(ROOT) not in graph


def test_exporting_leaves_the_agent_and_replaces_old_files(tmp_path):
    agent = small_agent()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    exported(agent, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert all(p.requires_grad for p in agent.policy.parameters())
    with torch.no_grad():
        agent.policy.final_layer.bias += 1
    path, act = exported(agent, tmp_path)
    inputs = make_inputs(agent.policy, 2)
    torch.testing.assert_close(act(*inputs.values()), expected(agent, **inputs))
    weights = load_file(path.with_suffix(".safetensors"))
    assert torch.equal(weights["policy.final_layer.bias"], agent.policy.final_layer.bias)
    written = {p.name for p in tmp_path.iterdir()}
    assert written == {"policy.json", "policy.pt2", "policy.safetensors"}


BAD_PATHS = {
    "policy.pt": "policy.pt2",
    "policy": "policy.pt2",
    "nowhere/policy.pt2": "No such file",
}


@pytest.mark.parametrize("name, said", BAD_PATHS.items())
def test_a_path_that_cannot_be_written_gets_one_line(tmp_path, name, said):
    with pytest.raises(folder.RunError) as refused:
        export_policy(small_agent(), tmp_path / name, n_candidates=1, facts={})
    message = str(refused.value)
    assert said in message and str(tmp_path / name) in message and "\n" not in message
    assert not list(tmp_path.iterdir())


def test_a_file_that_no_export_has_written_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text("a run's")
    with pytest.raises(folder.RunError, match="config.json.* choose another name"):
        export_policy(small_agent(), tmp_path / "config.pt2", n_candidates=1, facts={})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "a run's")]

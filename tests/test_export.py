"""Exported policies: a process without this project acts as the agent does, and the .json says enough to rebuild it by hand."""

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
from tiny_runs import train

import dql
import tasks
from trainer import folder, setup
from trainer.export import export_policy
from trainer.options import saved_options

pytestmark = pytest.mark.usefixtures("short_episodes")

FACTS = {
    "task": "antmaze-umaze-v0",
    "data": "a test",
    "score": 50.0,
    "step": 7,
    "order": ["x", "y"],
}


def make_agent(*sizes, gain=2.0, algo="ql", **how):
    """Its weights are `gain` times the usual, so that states and candidates differ in what they lead to."""
    make = {"ql": dql.DiffusionQL, "bc": dql.DiffusionBC}[algo]
    agent = make(*sizes, **how)
    with torch.no_grad():
        for network in (agent.policy, agent.critic_target):
            for p in network.parameters():
                p *= gain
    return agent


def make_inputs(policy, n_states, n=1, seed=0):
    """By the names of the program's inputs."""
    g = torch.Generator().manual_seed(seed)
    rows, A = n_states * n, policy.action_dim
    shapes = {
        "state": (n_states, policy.state_dim),
        "x_T": (rows, A),
        "noises": (policy.n_timesteps, rows, A),
    }
    inputs = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
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
    agent = make_agent(
        11, 3, algo="bc", hidden_dim=16, n_timesteps=3, schedule="cosine", max_action=3.0
    )
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


def test_a_process_without_this_project_acts_as_the_agent_does(antmaze, cloned, tmp_path):
    # 1 and 2 are special to torch.export, 2 is the example's, and 25 states of 50 candidates are several of the agent's pieces.
    numbers, cases = (1, 2, 3, 25), {"antmaze": (*antmaze, 50), "cloned": (*cloned, 1)}
    for name, (agent, path, _, n) in cases.items():
        for file in path.parent.iterdir():
            (tmp_path / f"{name}{file.suffix}").write_bytes(file.read_bytes())
        usage = tmp_path / f"{name}.json"
        usage.write_text(usage.read_text().replace("policy.pt2", f"{name}.pt2"))
        inputs = {
            f"{B}.{k}": v
            for B in numbers
            for k, v in make_inputs(agent.policy, B, n, seed=B).items()
        }
        save_file(inputs, tmp_path / f"{name}_inputs.safetensors")
    command = [sys.executable, "-I", "-c", STRANGER, " ".join(map(str, numbers)), *cases]
    ended = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    for name, (agent, _, _, n) in cases.items():
        found = load_file(tmp_path / f"{name}_actions.safetensors")
        for B in numbers:
            inputs = make_inputs(agent.policy, B, n, seed=B)
            torch.testing.assert_close(found[str(B)], expected(agent, **inputs))
        state, noise = found.get("state", torch.zeros(1, agent.policy.state_dim)), found["noise"]
        torch.testing.assert_close(
            found["usage"], expected(agent, state, noise[0], noise[1:], found.get("gumbel"))
        )


def test_a_states_action_does_not_depend_on_the_others(antmaze):
    agent, _, act = antmaze
    n, inputs, others = (
        50,
        make_inputs(agent.policy, 4, 50),
        make_inputs(agent.policy, 4, 50, seed=1),
    )
    together = act(*inputs.values())
    for b in range(4):
        row, rows = slice(b, b + 1), slice(b * n, (b + 1) * n)
        place = {"state": (row,), "x_T": (rows,), "noises": (slice(None), rows), "gumbel": (row,)}
        mixed = {k: v.clone() for k, v in others.items()}
        for k, where in place.items():
            mixed[k][where] = inputs[k][where]
        torch.testing.assert_close(act(*mixed.values())[b], together[b])
        torch.testing.assert_close(
            act(*(inputs[k][where] for k, where in place.items()))[0], together[b]
        )
        assert (act(*others.values())[b] - together[b]).abs().max() > 0.01


def test_over_many_gumbel_draws_the_choice_follows_softmax_of_the_smaller_q(tmp_path):
    n, draws = 5, 20_000
    agent = make_agent(
        3, 2, hidden_dim=16, n_timesteps=1, max_action=30.0
    )  # bounds that no candidate meets
    inputs = make_inputs(agent.policy, 1, n)
    candidates = agent.policy.sample(
        inputs["state"], x_T=inputs["x_T"], noises=inputs["noises"]
    ).detach()
    with torch.no_grad():
        for head in (
            agent.critic_target.q1_model,
            agent.critic_target.q2_model,
        ):  # that each is the smaller one somewhere
            q = head(torch.cat([inputs["state"].repeat(n, 1), candidates], 1))
            head[-1].weight /= q.std()
            head[-1].bias.sub_(q.mean()).div_(q.std())
    q1, q2 = (q[:, 0] for q in agent.critic_target(inputs["state"], candidates))
    _, act = exported(agent, tmp_path, n)
    gumbel = make_inputs(agent.policy, draws, n, seed=1)["gumbel"]
    actions = act(
        inputs["state"].repeat(draws, 1),
        inputs["x_T"].repeat(draws, 1),
        inputs["noises"].repeat(1, draws, 1),
        gumbel,
    )
    chosen = torch.cdist(actions, candidates).argmin(1)
    torch.testing.assert_close(actions, candidates[chosen])
    counts = chosen.bincount(minlength=n)

    def chi_square(q):
        share = draws * torch.softmax(q, 0)
        return float(((counts - share) ** 2 / share).sum())

    assert (
        chi_square(torch.minimum(q1, q2)) < 18.5
    )  # exceeded once in a thousand with 4 degrees of freedom
    for wrong in (q1, q2, torch.maximum(q1, q2), (q1 + q2) / 2, torch.zeros(n)):
        assert chi_square(wrong) > 100


def by_hand(about, weights, state, x_T, noises, gumbel=None):
    """The actions in numpy and float64, from what the .json and the .safetensors say alone."""
    w = {k: v.numpy().astype(np.float64) for k, v in weights.items()}
    state, x_T, noises = (x.numpy().astype(np.float64) for x in (state, x_T, noises))
    T, n, m, beta = (
        about["n_timesteps"],
        about["n_candidates"],
        about["max_action"],
        np.array(about["betas"]),
    )

    def mish(x):
        return x * np.tanh(np.log1p(np.exp(x)))

    def through(x, prefix, layers, last_is_linear=True):
        for i in layers:
            x = x @ w[f"{prefix}.{i}.weight"].T + w[f"{prefix}.{i}.bias"]
            if not (last_is_linear and i == layers[-1]):
                x = mish(x)
        return x

    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(8) / 7)
    time = through(np.concatenate([np.sin(angle), np.cos(angle)], 1), "policy.time_mlp", (1, 3))
    s = state.repeat(n, 0)
    alpha, bar = 1 - beta, np.cumprod(1 - beta)
    prev = np.concatenate([[1.0], bar[:-1]])
    a = x_T
    for k in range(T):
        t = T - 1 - k
        h = through(
            np.concatenate([a, time[[t]].repeat(len(a), 0), s], 1),
            "policy.mid_layer",
            (0, 2, 4),
            last_is_linear=False,
        )
        eps = h @ w["policy.final_layer.weight"].T + w["policy.final_layer.bias"]
        x0 = np.clip(np.sqrt(1 / bar[t]) * a - np.sqrt(1 / bar[t] - 1) * eps, -m, m)
        a = (beta[t] * np.sqrt(prev[t]) * x0 + (1 - prev[t]) * np.sqrt(alpha[t]) * a) / (1 - bar[t])
        if t > 0:
            a = a + np.sqrt(beta[t] * (1 - prev[t]) / (1 - bar[t])) * noises[k]
    a = np.clip(a, -m, m)
    if gumbel is None:
        return a
    q = [
        through(np.concatenate([s, a], 1), f"critic_target.q{i}_model", (0, 2, 4, 6))
        for i in (1, 2)
    ]
    best = (np.minimum(*q).reshape(-1, n) + gumbel.numpy()).argmax(1)
    return a.reshape(-1, n, a.shape[1])[np.arange(len(state)), best]


@pytest.mark.parametrize("which", ["antmaze", "cloned"])
def test_json_and_safetensors_are_enough_to_rebuild_the_policy_by_hand(which, request):
    agent, path, act = request.getfixturevalue(which)
    about, weights = (
        json.loads(path.with_suffix(".json").read_text()),
        load_file(path.with_suffix(".safetensors")),
    )
    networks = {"policy": agent.policy} | (
        {"critic_target": agent.critic_target} if agent.algo == "ql" else {}
    )
    assert weights.keys() == {
        f"{name}.{k}" for name, network in networks.items() for k in network.state_dict()
    }
    assert (
        about["facts"] == FACTS
        and about["algo"] == agent.algo
        and about["schedule"] == agent.policy.schedule
    )
    assert about["hidden_dim"] == len(weights["policy.mid_layer.0.weight"])
    np.testing.assert_allclose(
        about["betas"],
        dql.beta_schedule(agent.policy.schedule, agent.policy.n_timesteps),
        rtol=1e-6,
    )

    inputs = make_inputs(agent.policy, 6, about["n_candidates"])
    assert list(about["inputs"]) == list(inputs)
    sizes = {"B": 6, f"{about['n_candidates']}*B": 6 * about["n_candidates"]}
    actions = act(*inputs.values())
    stated = {
        k: [sizes.get(size, size) for size in shape]
        for k, shape in (about["inputs"] | about["outputs"]).items()
    }
    assert stated == {k: list(x.shape) for k, x in (inputs | {"action": actions}).items()}
    np.testing.assert_allclose(actions.numpy(), by_hand(about, weights, **inputs), atol=1e-5)


def test_one_candidate_is_a_plain_sample_as_the_agent_acts(tmp_path):
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=2)
    path, act = exported(agent, tmp_path, 1)
    inputs = make_inputs(agent.policy, 3)
    assert list(json.loads(path.with_suffix(".json").read_text())["inputs"]) == list(inputs)
    torch.testing.assert_close(act(*inputs.values()), expected(agent, **inputs))


def test_a_program_holds_the_weights_once_no_code_and_nothing_of_the_machine_it_was_made_on(
    antmaze,
):
    agent, path, _ = antmaze
    floats = 4 * sum(
        p.numel() for network in (agent.policy, agent.critic_target) for p in network.parameters()
    )
    assert floats < path.stat().st_size < 1.2 * floats
    assert floats < path.with_suffix(".safetensors").stat().st_size < 1.01 * floats
    with zipfile.ZipFile(path) as archive:
        files = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    pickles = [
        name
        for name, content in files.items()
        if zipfile.is_zipfile(io.BytesIO(content)) or "custom_obj" in name
    ]
    assert pickles == ["data/sample_inputs/model.pt"]
    arguments, named = torch.load(io.BytesIO(files[pickles[0]]), weights_only=True)
    assert len(arguments) == 4 and not named and not any(x.any() for x in arguments)
    graph = files["models/model.json"].decode()
    assert json.loads(graph) and ".py" not in graph and str(ROOT) not in graph


def test_a_trained_run_is_exported_with_the_weights_it_chose(tmp_path, data, no_pictures):
    run = folder.RunFolder(train(data, tmp_path / "runs"))
    config = saved_options(run.path)
    chosen = folder.load_json(run.path / "selection.json")["best"]
    agent = setup.make_agent(config, tasks.get(config.env), "cpu")
    folder.restore(agent, run.path / chosen["checkpoint"], weights_only=True)
    path = tmp_path / "policy.pt2"
    export_policy(
        agent,
        path,
        n_candidates=config.n_candidates,
        facts={"task": config.env, **chosen, **run.config()},
    )
    facts = json.loads(path.with_suffix(".json").read_text())["facts"]
    assert (
        facts["task"] == config.env
        and facts["score"] == chosen["score"]
        and facts["versions"]["torch"]
    )
    kept = load_file(run.path / chosen["checkpoint"])
    weights = load_file(path.with_suffix(".safetensors"))
    assert weights and all(torch.equal(value, kept[name]) for name, value in weights.items())
    inputs = make_inputs(agent.policy, 3, config.n_candidates)
    torch.testing.assert_close(
        torch.export.load(path).module()(*inputs.values()), expected(agent, **inputs)
    )


def test_exporting_leaves_the_agent_as_it_was_and_exporting_again_replaces(tmp_path):
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=1, algo="bc")
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    exported(agent, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert all(p.requires_grad for p in agent.policy.parameters())
    with torch.no_grad():
        agent.policy.final_layer.bias += 1
    path, act = exported(agent, tmp_path)
    inputs = make_inputs(agent.policy, 2)
    torch.testing.assert_close(act(*inputs.values()), expected(agent, **inputs))
    assert torch.equal(
        load_file(path.with_suffix(".safetensors"))["policy.final_layer.bias"],
        agent.policy.final_layer.bias,
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "policy.json",
        "policy.pt2",
        "policy.safetensors",
    ]


@pytest.mark.parametrize(
    "name, said",
    [("policy.pt", "policy.pt2"), ("policy", "policy.pt2"), ("nowhere/policy.pt2", "No such file")],
)
def test_a_path_that_cannot_be_written_gets_one_line(tmp_path, name, said):
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=1, algo="bc")
    with pytest.raises(folder.RunError) as refused:
        export_policy(agent, tmp_path / name, n_candidates=1, facts={})
    assert (
        said in str(refused.value)
        and str(tmp_path / name) in str(refused.value)
        and "\n" not in str(refused.value)
    )
    assert not list(tmp_path.iterdir())


def test_a_file_beside_it_that_no_export_has_written_is_not_replaced(tmp_path):
    agent = make_agent(3, 2, hidden_dim=16, n_timesteps=1, algo="bc")
    (tmp_path / "config.json").write_text("a run's")
    with pytest.raises(folder.RunError, match="config.json.* choose another name"):
        export_policy(agent, tmp_path / "config.pt2", n_candidates=1, facts={})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "a run's")]

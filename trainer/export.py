"""A trained policy as files that need nothing of this project.

    python dql.py --export runs/NAME policy.pt2 --which best

    policy.pt2           the acting policy, a torch.export program in core ATen operators
    policy.safetensors   its weights, named as in the released checkpoints, after "policy." and
                         "critic_target."
    policy.json          sizes, betas, equations, the program's inputs, its origin and usage:
                         enough to rebuild it in any language

    act = torch.export.load("policy.pt2").module()
    action = act(state, x_T, noises, gumbel)  # float32 on a CPU
    # (B, S), (B·n, A), (T, B·n, A), (B, n) -> (B, A)

The program draws nothing: all noise is an input, laid out as in kernels.FusedActor, so that a call
can be repeated anywhere. It chooses among n candidates as DiffusionQL.act does; a cloned policy, or
n = 1, is a plain sample and takes no gumbel. n is fixed, the number of states B is not, and states
do not affect each other. On a CPU a state takes the least time when about ten are decided in a
call. A run's --matmul-precision is not part of the program. torch._inductor's
aoti_compile_and_package takes it too.

A .pt2 is a zip archive: the weights as raw bytes, the graph as JSON, and example inputs, zeros, as
a pickle that holds only tensors.
"""

import copy
import io
import warnings
from pathlib import Path

import torch
import torch.nn as nn

from kernels import eager
from trainer.evaluation import load_run
from trainer.folder import RunError, save_json, save_tensors, saved
from trainer.options import Options


class Acting(nn.Module):
    """What DiffusionQL.act computes, with its randomness given.

    Without critic_target and gumbel each action is a plain sample.
    """

    def __init__(self, policy, critic_target=None):
        super().__init__()
        self.policy, self.critic_target = copy.deepcopy((policy, critic_target))
        self.cpu().requires_grad_(False)
        eager.speed_up_networks([self.policy], [self.critic_target] if critic_target else [])

    def forward(self, state, x_T, noises, gumbel=None):
        candidates = self.policy.sample(state, x_T=x_T, noises=noises)
        if gumbel is None:
            return candidates
        B, n, A = state.shape[0], gumbel.shape[1], self.policy.action_dim
        q = torch.minimum(*self.critic_target(state, candidates)).view(B, n)
        pick = (q + gumbel).argmax(1)  # a draw from softmax(q)
        return candidates.view(B, n, A).gather(1, pick.view(B, 1, 1).expand(B, 1, A)).squeeze(1)


def export_policy(agent, path, *, n_candidates: int, facts: dict) -> list[Path]:
    """Write an agent's policy to path, a .pt2, and beside it .safetensors and .json -> the paths.

    facts go into the .json as they are: task, data, score, step, versions, whatever is known. Files
    of an earlier export are replaced. Raises RunError for another ending, for a folder that cannot
    be written, and if a file of these names exists without a .pt2: it is of no earlier export.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        example = f"for example {path.with_suffix('.pt2').name}"
        raise RunError(f"{path} does not end in .pt2, as an exported policy must; {example}")
    weights, about = path.with_suffix(".safetensors"), path.with_suffix(".json")
    for other in (weights, about):
        if other.exists() and not path.exists():
            found = f"{other}, which goes with {path.name}, exists"
            raise RunError(f"{found} and is not of an earlier export: choose another name")
    n = 1 if agent.algo == "bc" else n_candidates
    acting = Acting(agent.policy, agent.critic_target if n > 1 else None)
    buffer = io.BytesIO()
    torch.export.save(traced(acting, n), buffer)
    with saved(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    save_tensors(weights, acting.state_dict())
    save_json(about, {**description(agent.policy, agent.algo, n, path.name), "facts": facts})
    return [path, weights, about]


def input_shapes(policy, n: int, states, rows) -> dict:
    """{name: shape} of the program's inputs, for n candidates of each state, `rows` in all."""
    shapes = {"state": (states, policy.state_dim), "x_T": (rows, policy.action_dim)}
    shapes["noises"] = (policy.n_timesteps, rows, policy.action_dim)
    if n > 1:
        shapes["gumbel"] = (states, n)
    return shapes


def traced(acting: Acting, n: int) -> torch.export.ExportedProgram:
    """The program for any number of states.

    torch notes paths of this machine beside each operator; they are removed.
    """
    B = torch.export.Dim("B", min=1)
    dynamic = input_shapes(acting.policy, n, B, n * B if n > 1 else B)
    example = input_shapes(acting.policy, n, 2, 2 * n)  # one state would be traced as a constant
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # about torch's own classes
        inputs = tuple(torch.zeros(shape) for shape in example.values())
        # strict: only Dynamo follows len(tensor) without taking it for a constant.
        program = torch.export.export(acting, inputs, dynamic_shapes=dynamic, strict=True)
        program = program.run_decompositions()
    for node in program.graph.nodes:
        for note in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
            node.meta.pop(note, None)
    return program


def description(policy, algo: str, n: int, name: str) -> dict:
    """What the .json says of the networks and of the program in the file `name`."""
    S, A, T, m = policy.state_dim, policy.action_dim, policy.n_timesteps, policy.max_action
    alpha_bar = [1.0] + [x**-2 for x in policy.x0_from_x]
    return {
        "algo": algo,
        "state_dim": S,
        "action_dim": A,
        "hidden_dim": policy.final_layer.in_features,
        "max_action": m,
        "n_candidates": n,
        "n_timesteps": T,
        "schedule": policy.schedule,
        "betas": [1 - after / before for before, after in zip(alpha_bar, alpha_bar[1:])],
        "equations": equations(T, n),
        "inputs": input_shapes(policy, n, "B", f"{n}*B" if n > 1 else "B"),
        "outputs": {"action": ("B", A)},
        "usage": usage(S, A, T, n, m, name),
    }


def usage(S: int, A: int, T: int, n: int, max_action: float, name: str) -> list[str]:
    """Python that calls the program in the file `name`."""
    lines = [
        "import torch",
        f"act = torch.export.load({name!r}).module()  # made with torch {torch.__version__}",
        f"B, state = 1, torch.zeros(1, {S})  # any number of states; float32, on the CPU",
        f"noise = torch.randn({T + 1}, B * {n}, {A})",
    ]
    inputs = "state, noise[0], noise[1:]"
    if n > 1:
        lines.append(f"gumbel = -torch.empty(B, {n}).exponential_().log()")
        inputs += ", gumbel"
    result = f"# (B, {A}), from {-max_action} to {max_action}"
    return [*lines, f"action = act({inputs})  {result}"]


def equations(T: int, n: int) -> list[str]:
    """The algorithm, without reference to code; layers are named as in the .safetensors."""
    sample = [
        "a linear layer is x W^T + b; mish(x) = x tanh(softplus(x))",
        f"time(t), t = 0..{T - 1}: f_k = 10000^(-k/7), k = 0..7; "
        "[sin(t f), cos(t f)] through policy.time_mlp.1, mish, .3",
        "eps(a, t, s): [a, time(t), s] through policy.mid_layer.0, .2 and .4, mish after each, "
        "then policy.final_layer",
        "alpha = 1 - betas; alpha_bar = cumprod(alpha); prev = [1, alpha_bar[:-1]]; m = max_action",
        f"a = x_T, its row b*{n} + j being candidate j of state b; "
        f"then for k = 0..{T - 1}, t = {T - 1} - k:",
        "    x0 = clamp(sqrt(1/alpha_bar[t]) a - sqrt(1/alpha_bar[t] - 1) eps(a, t, s), -m, m)",
        "    a = (betas[t] sqrt(prev[t]) x0 + (1 - prev[t]) sqrt(alpha[t]) a) / (1 - alpha_bar[t])",
        "    if t > 0: a = a + sqrt(betas[t] (1 - prev[t]) / (1 - alpha_bar[t])) noises[k]",
        "a = clamp(a, -m, m)",
    ]
    choose = [
        "Q_i(s, a), i = 1, 2: [s, a] through critic_target.q{i}_model.0, .2 and .4, "
        "mish after each, then .6",
        "action: of a state's candidates the one with the largest min(Q_1, Q_2) + gumbel, "
        "a draw from softmax(min(Q_1, Q_2))",
    ]
    return sample + choose if n > 1 else sample


def export_run(options: Options) -> None:
    """--export: write the policy of a run's chosen checkpoint for use without this project."""
    folder, file = options.export
    run, _, agent, chosen = load_run(folder, options)
    made = run.config()
    facts = {"run": run.path.resolve().name, "task": options.env, **chosen}
    facts |= {"crc32": made["data"]["crc32"], "seed": options.seed, "quick": options.quick}
    facts |= {"versions": made["versions"]}
    for path in export_policy(agent, file, n_candidates=options.n_candidates, facts=facts):
        print(f"wrote {path}, {path.stat().st_size:,} bytes")
    found = f"score {chosen['score']:.1f} ({chosen['data']})"
    print(f"{options.env}, {options.which} (update {chosen['step']:,}): {found}")

"""The device and the agents that options ask for."""

import torch

from dql import DiffusionBC, DiffusionQL
from trainer.options import Options, UserError

ALGORITHMS = {"ql": DiffusionQL, "bc": DiffusionBC}


def choose_device(options: Options) -> torch.device:
    """Also sets what holds for the whole process: threads and the precision of products."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    name = best if options.device == "auto" else options.device
    try:
        return torch.Generator(torch.empty(0, device=name).device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from e


def make_agent(options: Options, task, device) -> DiffusionQL:
    how = {"max_action": task.max_action, "device": device, "seed": options.seed}
    algorithm = ALGORITHMS[options.algo]
    return algorithm(task.state_dim, task.action_dim, **how, **options.hyperparameters())

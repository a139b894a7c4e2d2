"""Diffusion policies fused into Triton kernels.

A reverse-diffusion chain, or a whole decision, is one launch; an update is nine.

    sampler = kernels.FusedSampler(policy)          # a dql.DiffusionPolicy
    actions = sampler(states)                       # (B, state_dim) -> (B, action_dim)
    actor = kernels.FusedActor(policy, critic, 50)  # best of 50 by a dql.TwinCritic
    actions = actor(states)                         # (B, state_dim) -> (B, action_dim)
    update = kernels.FusedUpdate(agent, transitions, 256)  # one dql.DiffusionQL, or several
    losses = update.run(1000)                       # a thousand updates

kernels.graphs captures functions of tensors in CUDA graphs; kernels.eager makes plain agents
faster without Triton. kernels.available() says whether the fused kernels can run here,
kernels.why_not() why not. They also run on CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1), slowly, which is how they are tested without a GPU.
"""

from importlib.util import find_spec

import torch

__all__ = ["FusedActor", "FusedSampler", "FusedUpdate", "UnsupportedError", "available", "why_not"]

NO_TRITON = "triton is not installed: pip install 'triton>=3.6,<3.9' (it has packages for Linux)"

if find_spec("triton"):
    from .actor import FusedActor
    from .packing import UnsupportedError, interpreting
    from .sampler import FusedSampler
    from .update import FusedUpdate


def __getattr__(name):
    if name in __all__:
        raise ImportError(NO_TRITON)
    raise AttributeError(f"module 'kernels' has no attribute {name!r}")


def why_not() -> str:
    """In a line, why the kernels cannot run here, GPU or interpreter; "" if they can."""
    if not find_spec("triton"):
        return NO_TRITON
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "no CUDA GPU was found"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{name} is sm_{major}{minor}; the kernels need sm_80 (A100) or newer"
    return ""


def available() -> bool:
    """Whether the kernels can run here."""
    return not why_not()

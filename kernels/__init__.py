"""Diffusion policies fused into Triton kernels: a reverse-diffusion chain, or a whole decision, in one launch; an update in nine.

    sampler = kernels.FusedSampler(policy)          # a dql.DiffusionPolicy, or a module with its attributes
    actions = sampler(states)                       # (B, state_dim) -> (B, action_dim)
    actor = kernels.FusedActor(policy, critic, 50)  # best of 50 by a dql.TwinCritic
    actions = actor(states)                         # (B, state_dim) -> (B, action_dim)
    update = kernels.FusedUpdate(agent, transitions, 256)  # a dql.DiffusionQL; or several, side by side
    losses = update.run(1000)                       # a thousand updates

kernels.graphs captures what can be captured in a CUDA graph.

kernels.available() says whether they can run here, kernels.why_not() why not. They also run on CPU tensors in Triton's
interpreter (TRITON_INTERPRET=1), slowly, which is how they are tested. Nothing here has been run on a GPU yet.
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
    raise ImportError(NO_TRITON) if name in __all__ else AttributeError(f"module 'kernels' has no attribute {name!r}")


def why_not() -> str:
    """In a line, why the kernels cannot run on this machine's GPU or in the interpreter; empty if they can."""
    if not find_spec("triton"):
        return NO_TRITON
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "no CUDA GPU was found"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}; the kernels need sm_80 (A100) or newer"
    return ""


def available() -> bool:
    """Whether the kernels can run here."""
    return not why_not()

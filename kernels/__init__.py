"""Diffusion policies fused into Triton kernels: the whole reverse-diffusion chain in one launch.

    sampler = kernels.FusedSampler(policy)          # a dql.DiffusionPolicy, or a module with its attributes
    actions = sampler(states)                       # (B, state_dim) -> (B, action_dim)

kernels.available() says whether they can run here, kernels.why_not() why not. They also run on CPU tensors in Triton's
interpreter (TRITON_INTERPRET=1), slowly, which is how they are tested. Nothing here has been run on a GPU yet.
"""

import torch

from .packing import UnsupportedError, interpreting
from .sampler import FusedSampler

__all__ = ["FusedSampler", "UnsupportedError", "available", "why_not"]


def why_not() -> str:
    """In a line, why the kernels cannot run on this machine's GPU or in the interpreter; empty if they can."""
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

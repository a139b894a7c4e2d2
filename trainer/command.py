"""What `python dql.py` does: train, --resume, --eval, --export."""

import sys

import torch

from tasks import TaskError
from trainer.backends import first_line
from trainer.evaluation import evaluate_run
from trainer.export import export_run
from trainer.folder import RunError
from trainer.loop import train
from trainer.options import UserError, parse


def main(argv: list[str] | None = None) -> int:
    """-> the exit status: 0; 1 for bad input, named in one line; 130 when interrupted"""
    description = "Diffusion-QL (Wang, Hunt, Zhou, ICLR 2023) on a D4RL task."
    try:
        options = parse(sys.argv[1:] if argv is None else argv, description)
        what = evaluate_run if options.eval else export_run if options.export else train
        what(options)
    except (UserError, TaskError, RunError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as e:
        on_gpu = isinstance(e, torch.OutOfMemoryError)
        # torch has no class of its own for a CPU's memory.
        if not (on_gpu or isinstance(e, MemoryError) or "DefaultCPUAllocator" in str(e)):
            raise
        whose = "the GPU's memory" if on_gpu else "memory"
        advice = "take fewer --seeds, --n-candidates or a smaller --batch-size"
        print(f"error: {whose} is full ({first_line(e)}); {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0

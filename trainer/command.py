"""What `python dql.py` does: train, --resume, --eval, --export."""

import errno
import sys

from tasks import TaskError
from trainer import interrupts
from trainer.folder import RunError
from trainer.options import UserError, parse
from trainer.terminal import first_line, steady_output


def main(argv: list[str] | None = None) -> int:
    """-> the exit status: 0; 1 for bad input, named in one line; 130 for Ctrl-C, 143 for SIGTERM,
    which save first"""
    with interrupts.as_exceptions(), steady_output() as output:
        try:
            return _status(sys.argv[1:] if argv is None else argv) or _lost(output.error)
        except SystemExit:  # --help
            if _lost(output.error):
                return 1
            raise


def _lost(error: OSError | None) -> int:
    """1, after a line, if what was said could not be written."""
    if error is None or error.errno == errno.EPIPE:  # as of `| head`, which has seen enough
        return 0
    print(f"error: what was said could not be written: {error.strerror or error}", file=sys.stderr)
    return 1


def _status(argv: list[str]) -> int:
    try:
        _run(argv)
    except (UserError, TaskError, RunError) as e:
        print(f"error: {first_line(e)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as e:
        return getattr(e, "status", 130)
    except (MemoryError, RuntimeError) as e:
        if not (what := _full_memory(e)):
            raise
        advice = "take fewer --seeds, --n-candidates or a smaller --batch-size"
        print(f"error: {what} is full ({first_line(e)}); {advice}", file=sys.stderr)
        return 1
    return 0


def _run(argv: list[str]) -> None:
    # Here, not above: --help need not wait for what it does not use.
    options = parse(argv, "Diffusion-QL (Wang, Hunt, Zhou, ICLR 2023) on a D4RL task.")
    if options.eval:
        from trainer.evaluation import evaluate_run as run
    elif options.export:
        from trainer.export import export_run as run
    else:
        from trainer.loop import train as run
    run(options)


def _full_memory(error: Exception) -> str:
    """Which memory this error says is full, if any."""
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory"
    # torch has no class of its own for a CPU's memory.
    full = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return "memory" if full else ""

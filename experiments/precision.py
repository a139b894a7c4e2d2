"""Does it learn as well with products in fp16 or tf32? Several seeds at each precision.

    python -m experiments.precision             # on a GPU: fused kernels, against eager float32
    python -m experiments.precision --epochs 7  # on an idle CPU: plain torch, rounded: 1.5 hours

The quick recipe on generated antmaze data. On a CPU the kernels' arithmetic is imitated
(bench/rounding.py). fp16x3 needs no study: its gradients are as far from float64's as eager
float32's are (tests/test_gradients.py). Runs are kept in runs/precision. Writes
runs/experiments/precision_DEVICE.json.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

import dql
from bench.folders import add_results_option, make_folder
from bench.rounding import ROUND, imitate
from bench.timing import device_slug
from experiments.runs import ROOT, Job, complete, make_job, records
from kernels.eager import has_compiler
from trainer.folder import save_json
from trainer.interrupts import as_exceptions
from trainer.options import Options
from trainer.provenance import describe
from trainer.scores import mean_and_std
from trainer.terminal import steady_output

ENV = "antmaze-umaze-v0"
IMITATE = "--imitate"


def make_precision_job(precision: str, seed: int, asked, on_gpu: bool) -> Job:
    options, more = "--data generated --quick --matmul-precision highest".split(), {}
    options += ["--epochs", str(asked.epochs), "--eval-every", str(asked.epochs)]
    options += ["--threads", str(asked.threads)]
    if on_gpu and precision == "eager":
        options += ["--backend", "eager"]
    elif on_gpu:
        options += ["--backend", "fused", "--precision", precision]
    else:
        options += ["--backend", "compile"] if has_compiler() else []
        if precision in ROUND:
            more["program"] = ("-m", "experiments.precision", IMITATE, precision)
    more["name"] = f"{precision}, seed {seed}"
    return make_job(ENV, [seed], options, asked.runs / precision, **more)


def figures_of(run: Path) -> dict:
    """The last score, the last epoch's means, and how the losses went."""
    epochs = records(run, "epoch")
    means = ("bc_loss", "q_loss", "critic_loss", "actor_grad_norm", "critic_grad_norm")
    return {
        "score": records(run, "evaluation")[-1]["score"],
        **{k: epochs[-1][k] for k in means},
        "curve": {k: [r[k] for r in epochs] for k in ("bc_loss", "critic_loss")},
    }


@steady_output()
@as_exceptions()
def main(argv: list[str] | None = None) -> None:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    add, default = parser.add_argument, "default: fp32 fp16 on a CPU; on a GPU all four, and eager"
    add("--precisions", nargs="+", default=None, help=default)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=int, default=15, help="of the quick recipe")
    add("--threads", type=int, default=1)
    add_results_option(parser, "experiments")
    add("--runs", type=Path, default=ROOT / "runs" / "precision")
    asked = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    known = ["fp32", "fp16", "tf32"]
    if on_gpu:
        known = ["eager", "fp32", "fp16x3", "tf32", "fp16"]
    precisions = asked.precisions or (known if on_gpu else known[:2])
    if not set(precisions) <= set(known):
        raise SystemExit(f"--precisions here are {', '.join(known)}")
    make_folder(asked.out)

    each = [{"precision": p, "seed": seed} for p in precisions for seed in asked.seeds]
    runs = complete([make_precision_job(**one, asked=asked, on_gpu=on_gpu) for one in each])
    figures = [one | figures_of(run) for one, run in zip(each, runs)]
    print(f"{'':8s}{'scores':>22s}{'mean':>8s}{'std':>6s}{'BC loss':>10s}{'critic loss':>13s}")
    for precision in precisions:
        mine = [f for f in figures if f["precision"] == precision]
        scores = [f["score"] for f in mine]
        mean, std = mean_and_std(scores)
        bc, critic = (np.mean([f[k] for f in mine]) for k in ("bc_loss", "critic_loss"))
        spread = "" if std is None else f"{std:.1f}"
        print(f"{precision:8s}{str(scores):>22s}{mean:8.1f}{spread:>6s}{bc:10.4f}{critic:13.3f}")
    where = describe()
    how = "fused kernels" if on_gpu else "imitated on a CPU: operands rounded, sums float32"
    updates = asked.epochs * Options.updates_per_epoch
    about = {**where, "env": ENV, "how": how, "updates": updates}
    path = asked.out / f"precision_{device_slug(where)}.json"
    save_json(path, {**about, "figures": figures})
    print(f"figures in {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == [IMITATE]:  # dql.py's own command line, in a process that rounds
        imitate(sys.argv[2])
        sys.exit(dql.main(sys.argv[3:]))
    sys.exit(main())

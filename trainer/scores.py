"""Scores over seeds: mean and standard deviation. Without torch, for processes that only wait."""

import numpy as np


def mean_and_std(scores) -> tuple[float, float | None]:
    """Mean and standard deviation over seeds; None if there is only one."""
    mean = float(np.mean(scores))
    return mean, float(np.std(scores, ddof=1)) if len(scores) > 1 else None


def mean_and_spread(scores, digits=1) -> str:
    """The same as text: 51.2 ± 3.4"""
    mean, std = mean_and_std(scores)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None else "")

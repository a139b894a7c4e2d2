"""What every result carries: the machine, the versions, the commit and the date."""

import os
import platform
import time

import numpy as np
import torch

from run_folder import commit, cpu_name


def describe() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }

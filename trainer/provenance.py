"""Where a figure comes from: the commit, the versions, the machine and the date."""

import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "mujoco", "gymnasium", "gymnasium-robotics")


def describe() -> dict:
    """What every run and every committed figure carries. gpu is None without one."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # not every task and backend needs each
            versions[name] = version(name)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "device": gpu or cpu_name(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "gpu": gpu,
        "python": platform.python_version(),
        **versions,
        "torch": torch.__version__,  # with its build, as in 2.13.0+cpu
    }


def commit() -> str:
    """This checkout's commit, "+changes" added if tracked files differ from it; "" without one.

    $DQL_COMMIT, if set, says it instead: a cluster's nodes get the code without its history.
    """
    if "DQL_COMMIT" in os.environ:
        return os.environ["DQL_COMMIT"]

    def git(*words):
        where = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=where, capture_output=True, text=True).stdout

    try:
        changed = "+changes" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "--short", "HEAD").strip() + changed
    except OSError:  # no git here
        return ""


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(li.split(":", 1)[1].strip() for li in lines if li.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

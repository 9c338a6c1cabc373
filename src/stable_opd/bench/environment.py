"""Where a run takes place: versions, commit and hardware."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("stable-opd", "torch", "lightning", "transformers")


def describe() -> dict[str, Any]:
    """Return versions, the commit of the working directory if it is under git, and the names of CPU and GPUs."""
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "host": {"cpu": _cpu(), "gpu": _gpus()},
    }


def _commit() -> str | None:
    """Return the commit, with a plus if files that git knows differ from it."""
    head = _output("git", "rev-parse", "HEAD")
    if not head:
        return None
    return f"{head}+" if _output("git", "status", "--porcelain", "--untracked-files=no") else head


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.is_file() else ())
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Ask the driver's tool, because asking torch would take memory on a device for as long as the runner lives."""
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None

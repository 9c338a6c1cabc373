"""Peak memory of this process: of the process on a CPU, of the allocator on a GPU."""

import re
from pathlib import Path

import torch


class Meter:
    """Measures the highest memory use since `reset`, above what was in use when it was made.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = self._now()

    def reset(self) -> None:
        """Forget the highest use so far."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc_pid_clear_refs(5)

    def peak(self) -> int:
        """Return the highest use since the reset, above that at the start, in bytes."""
        return (torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")) - self.before

    def _now(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")


def _status(field: str) -> int:
    """Return a field of this process's status in bytes; the kernel gives it in KiB."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"Expected {field} in /proc/self/status, but it is not there; the benchmark needs Linux.")
    return 1024 * int(found[1])

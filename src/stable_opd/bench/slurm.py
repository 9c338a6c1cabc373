"""A benchmark as a job array."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from stable_opd.bench.expand import Run


def script(runs: Sequence[Run], spec: Path, out: Path, jobs: int | None = None) -> str:
    """Return the text of a file for sbatch: one line per run.

    Each task runs its line under the runner, so that one that was preempted goes on when it is queued again, and one
    that is finished is not repeated.

    Args:
        runs: The runs.
        spec: The spec, as the user names it.
        out: Folder of the benchmark, as the user names it.
        jobs: How many tasks may run at a time; none leaves that to the cluster.
    """
    throttle = "" if jobs is None else f"%{jobs}"
    lines = [f"  {shlex.quote(run.name)}  # {run.command}" for run in runs]
    again = shlex.join(["stable-opd", "bench", str(spec), "--out", str(out)])
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={spec.stem}",
            f"#SBATCH --array=0-{len(runs) - 1}{throttle}",
            f"#SBATCH --output={out}/slurm-%A_%a.log",
            "#SBATCH --requeue",
            "# Partition, time and devices are options of sbatch, which win over what stands here:",
            f"#   sbatch --time=4:00:00 --gres=gpu:1 {shlex.quote(str(out / 'array.sh'))}",
            f"# Collect the results by: {again} --collect",
            "set -euo pipefail",
            "runs=(",
            *lines,
            ")",
            f'exec {again} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )

"""Coverage-guided fuzzing of every door through which input comes in.

    pip install -e '.[fuzz]'
    python -m benchmarks.fuzz --minutes 10

sends mutations of small inputs of our own through each door for so many minutes, one door after the other, guided by
the code that they reach of this library and of its parsers. Inputs that reach something new are kept in the folder, so
the same command goes on from there. It prints the tally of all calls that share the folder; what was found is in
DOOR.findings.jsonl there.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fuzz import seeds
from benchmarks.fuzz.doors import DOORS
from benchmarks.runs import ROOT, versions

#: Seconds and MiB that one input may take.
PATIENCE, MEMORY = 20, 4096

_DONE = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_COVERED = re.compile(r"cov: (\d+) ft: (\d+)")


def fuzz(door: str, minutes: float, folder: Path) -> dict[str, float]:
    """Fuzz one door, again after each input that ended the process, and return what it came to."""
    end, executed, covered, stops = time.monotonic() + 60 * minutes, 0, 0, 0
    inputs, findings, log = folder / door, folder / f"{door}.findings.jsonl", folder / f"{door}.log"
    start, used = time.monotonic(), _cpu()
    while (left := end - time.monotonic()) > 1:
        options = [f"-max_total_time={int(left)}", f"-timeout={PATIENCE}", f"-rss_limit_mb={MEMORY}", "-max_len=8192"]
        options += ["-print_final_stats=1", f"-artifact_prefix={folder / door}-", str(inputs)]
        command = [sys.executable, "-m", "benchmarks.fuzz.target", door, str(findings), *options]
        with log.open("w", encoding="utf-8") as file:
            status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        said = log.read_text(encoding="utf-8", errors="replace")
        executed += max(map(int, [*_DONE.findall(said), *re.findall(r"^#(\d+)", said, re.MULTILINE)]), default=0)
        covered = max([covered, *(int(each) for each, _ in _COVERED.findall(said))])
        if status == 0:
            break
        stops += 1
        if not _COVERED.search(said):
            raise RuntimeError(f"Expected the fuzzer of {door} to start, but got {status}. See {log}.")
    return {
        "minutes": (time.monotonic() - start) / 60,
        "cpu": (_cpu() - used) / 60,
        "executed": executed,
        "covered": covered,
        "inputs": sum(1 for _ in inputs.iterdir()),
        "stops": stops,
        "findings": len(findings.read_text(encoding="utf-8").splitlines()) if findings.exists() else 0,
    }


def _cpu() -> float:
    """Return the seconds that ended processes have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(tally: dict[str, list[dict[str, float]]]) -> str:
    """Return a row per door: sums over all calls, and the most code that one of them reached."""
    rows = ["| door | minutes | of CPU | inputs tried | edges reached | inputs kept | processes ended | findings |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for door, calls in tally.items():
        summed = ("minutes", "cpu", "executed", "stops")
        minutes, cpu, executed, stops = (sum(each[key] for each in calls) for key in summed)
        covered, last = max(each["covered"] for each in calls), calls[-1]
        figures = (f"{minutes:.1f}", f"{cpu:.1f}", executed, covered, last["inputs"], stops, last["findings"])
        rows.append(f"| {' | '.join([door, *map(str, figures)])} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Fuzz doors and write the tally."""
    parser = argparse.ArgumentParser("python -m benchmarks.fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("doors", nargs="*", default=list(DOORS), metavar="DOOR", help=f"out of {', '.join(DOORS)}")
    parser.add_argument("--minutes", type=float, default=1.0, help="for each door")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="for inputs and findings")
    chosen = parser.parse_args()
    folder = chosen.folder.resolve()
    seeds.write(folder)
    path = folder / "tally.json"
    tally = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for door in chosen.doors:
        tally.setdefault(door, []).append(fuzz(door, chosen.minutes, folder))
        path.write_text(json.dumps(tally), encoding="utf-8")
        print(table({door: tally[door]}), flush=True)
    print(table(tally), versions(), sep="\n")


if __name__ == "__main__":
    main()

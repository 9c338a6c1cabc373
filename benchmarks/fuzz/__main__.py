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
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.fuzz import seeds
from benchmarks.fuzz.doors import DOORS
from benchmarks.runs import ROOT, versions

#: Seconds and MiB that one input may take.
PATIENCE, MEMORY = 20, 4096


def fuzz(target: "subprocess.Popen[str]", door: str, minutes: float, folder: Path) -> dict[str, float]:
    """Fuzz one door, again after each input that ended the process, and return what it came to."""
    inputs, findings, log = folder / door, folder / f"{door}.findings.jsonl", folder / f"{door}.log"
    tally = dict.fromkeys(("cpu", "executed", "covered", "stops"), 0.0)
    start = time.monotonic()
    while (left := start + 60 * minutes - time.monotonic()) > 1:
        options = [f"-max_total_time={int(left)}", f"-timeout={PATIENCE}", f"-rss_limit_mb={MEMORY}", "-max_len=8192"]
        options += ["-print_final_stats=1", f"-artifact_prefix={folder / door}-", str(inputs)]
        told = _ask(target, {"door": door, "findings": str(findings), "log": str(log), "options": options})
        said = log.read_text(encoding="utf-8", errors="replace")
        tally["cpu"] += told["seconds"] / 60
        tally["executed"] += max(map(int, re.findall(r"^#(\d+)", said, re.MULTILINE)), default=0)
        tally["covered"] = max([tally["covered"], *(int(each) for each in re.findall(r"cov: (\d+) ft:", said))])
        if told["status"] == 0:
            break
        tally["stops"] += 1
        if not tally["executed"]:
            raise RuntimeError(f"Expected the fuzzer of {door} to start, but got {told['status']}. See {log}.")
    found = len(findings.read_text(encoding="utf-8").splitlines()) if findings.exists() else 0
    kept = sum(1 for _ in inputs.iterdir())
    return {"minutes": (time.monotonic() - start) / 60, **tally, "inputs": kept, "findings": found}


def _ask(target: "subprocess.Popen[str]", what: dict[str, object]) -> dict[str, float]:
    assert target.stdin is not None
    assert target.stdout is not None
    print(json.dumps(what), file=target.stdin, flush=True)
    told: dict[str, float] = json.loads(target.stdout.readline())
    return told


def table(tally: dict[str, list[dict[str, float]]]) -> str:
    """Return a row per door: sums over all calls, and the most code that one of them reached."""
    rows = ["| door | minutes | of CPU | inputs tried | edges reached | inputs kept | processes ended | findings |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for door, calls in tally.items():
        minutes, cpu = (f"{sum(each[key] for each in calls):.1f}" for key in ("minutes", "cpu"))
        executed, stops = (int(sum(each[key] for each in calls)) for key in ("executed", "stops"))
        covered, last = int(max(each["covered"] for each in calls)), calls[-1]
        figures = (door, minutes, cpu, executed, covered, last["inputs"], stops, last["findings"])
        rows.append(f"| {' | '.join(map(str, figures))} |")
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
    command = [sys.executable, "-m", "benchmarks.fuzz.target"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        for door in chosen.doors:
            tally.setdefault(door, []).append(fuzz(target, door, chosen.minutes, folder))
            path.write_text(json.dumps(tally), encoding="utf-8")
            print(table({door: tally[door]}), flush=True)
    print(table(tally), versions(), sep="\n")


if __name__ == "__main__":
    main()

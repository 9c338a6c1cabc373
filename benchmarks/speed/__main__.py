"""The command: ``python -m benchmarks.speed``."""

import argparse
import json
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.speed import run
from benchmarks.speed.report import machine, markdown, versions
from benchmarks.speed.turns import ROOT
from benchmarks.speed.workload import GRIDS, PAIRS, Workshop
from tqdm import tqdm

PARTS = ("steps", "objective", "losses", "memory", "linearity")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.speed", description="Our training step beside that of TRL.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--smoke", action="store_true", help="our two engines on one cell, without TRL, with a floor")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--cells", nargs="+", help="whole steps of these cells only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds-per-cell", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of turns that a cell has at least, 4 steps each")
    parser.add_argument("--samples", type=int, default=4, help="answers per prompt")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", choices=tuple(PAIRS), default="tiny")
    parser.add_argument("--precision", choices=("32-true", "bf16-true", "bf16-mixed"))
    options = parser.parse_args(arguments)
    options.precision = options.precision or ("32-true" if options.device == "cpu" else "bf16-true")
    if options.rounds < 2:
        parser.error(f"Expected at least 2 rounds, without which there is no interval, but got {options.rounds}.")
    known = {cell.name: cell for cell in GRIDS[options.shapes].steps}
    if unknown := set(options.cells or ()) - set(known):
        parser.error(f"Expected cells among {', '.join(known)}, but got {', '.join(sorted(unknown))}.")
    options.cells = [known[name] for name in options.cells or known]
    return options


def measure(options: argparse.Namespace, bench: run.Bench) -> dict[str, Any]:
    """Do what was asked for, part by part."""
    if options.smoke:
        return {"smoke": run.smoke(bench)}
    results: dict[str, Any] = {"gate": run.gate(bench)}
    if "steps" in options.parts:
        results["steps"] = [run.compare_steps(bench, cell) for cell in tqdm(options.cells, desc="steps")]
        if options.device == "cuda":
            results["roofline"] = run.roofline(bench, options.cells, results["steps"])
    if "objective" in options.parts:
        cells = tqdm(bench.grid.objective, desc="objective")
        results["objective"] = [run.compare_objectives(bench, cell) for cell in cells]
    if "losses" in options.parts:
        brief = replace(bench, seconds=bench.seconds / 4, rounds=min(bench.rounds, 3))
        results["losses"] = [run.compare_losses(brief, cell) for cell in tqdm(run.loss_cells(bench), desc="losses")]
    if "memory" in options.parts:
        results["memory"] = run.loss_memory(bench)
    if "linearity" in options.parts:
        results["linearity"] = run.linearity(bench)
    return results


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-") as folder:
        bench = run.Bench(
            shop=Workshop(Path(folder), PAIRS[options.shapes], options.device),
            grid=GRIDS[options.shapes],
            logs=ROOT / "runs" / "speed",
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            seconds=options.seconds_per_cell,
            rounds=options.rounds,
            samples=options.samples,
        )
        results = measure(options, bench)
    results["about"] = {
        "command": shlex.join(["python", "-m", "benchmarks.speed", *arguments]),
        "machine": machine(options.device),
        "threads": options.threads,
        "precision": options.precision,
        "versions": versions(),
    }
    page = markdown(results)
    print(page)
    (out / "speed.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "speed.md").write_text(page, encoding="utf-8")
    if not options.smoke:
        from benchmarks.speed.plots import draw  # matplotlib comes with an extra

        draw(results, out / "speed.png")


if __name__ == "__main__":
    main(sys.argv[1:])

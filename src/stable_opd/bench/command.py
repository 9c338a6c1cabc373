"""The command `stable-opd bench`."""

import argparse
import difflib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from stable_opd.bench.expand import Run, expand
from stable_opd.bench.folder import metric_rows, write_whole
from stable_opd.bench.plots import WITHOUT_PLOT, draw
from stable_opd.bench.results import Result, collect, write_rows, write_table
from stable_opd.bench.schedule import Stopped, execute
from stable_opd.bench.slurm import script
from stable_opd.bench.spec import Spec, read
from stable_opd.bench.tables import page
from stable_opd.bench.yamls import SpecError

DESCRIPTION = "Compare combinations of components: run every variant of a recipe with every seed, and write tables."
EPILOG = """\
A spec:

  config: ../configs/quickstart.yaml     # paths start at the spec
  options: {trainer.max_steps: 100}      # for all runs
  axes:                                  # every variant of one axis meets every one of the others
    mixture:
      none: {model.mixture: StudentOnly}
      golden: {model.mixture: {class_path: GoldenMixture, init_args: {weight: 2.0}}}
    anchor:
      without: {model.constraints.anchor: null}
      with: {}
  seeds: [0, 1, 2, 3, 4, 5]
  metrics:                               # reduce: last, max, min, mean with a window, or first above a bound
    accuracy: {column: val/accuracy, better: higher}
    truncation: {column: train/truncation_rate, reduce: max, better: lower}
    collapse: {column: train/truncation_rate, reduce: first, above: 0.9}
  exclude: [{mixture: none, anchor: with}]
  baseline: {mixture: none, anchor: without} # the others are tested against it

Without a `baseline` the best is tested against the runner-up. A variant may name a `config` of its own. A component
that is named by its class replaces the recipe's with all its settings. `table: math` adds a table of the metrics named
math500, minerva, olympiad, amc, aime24 and aime25; `alpha` is the largest p-value that counts as significant, 0.05 if
left out. Two axes make a heat map of the first metric. Curves are drawn of all metrics, or as `plots` says, for example

  plots:
    tokens:                              # tokens.png
      variants: {mixture: none}
      panels: {Advantage: {repeated: train/advantage_repeated, regular: train/advantage_regular}}

With `command: detect` in place of `config`, the runs are those of `stable-opd detect`.

A finished run is not repeated, an interrupted one goes on from its last checkpoint, and one whose recipe has changed is
run anew: after whatever happened, give the same command again. Changed data or code of your own is not noticed; delete
the folders of the runs then. Each run is an ordinary `stable-opd fit` in DIR/VARIANTS/seed-N; results.md, results.csv
and results.jsonl are in DIR.
"""


def bench(args: Sequence[str]) -> None:
    """Compare combinations of components, as a spec names them.

    Args:
        args: What follows `stable-opd bench`.
    """
    parser = _parser()
    chosen = parser.parse_args(args)
    try:
        spec = read(chosen.spec)
        out = chosen.out or Path("runs") / chosen.spec.stem
        runs = expand(spec, out)
        if chosen.dry_run:
            print("\n".join(run.command for run in runs))
        elif chosen.slurm:
            _write_script(chosen.spec, runs, out, chosen.jobs)
        elif chosen.only:
            mine = _chosen(runs, chosen.only)
            execute(mine, chosen.jobs or 1)
            _leave(collect(spec, mine))
        else:
            _run(spec, runs, out, None if chosen.collect else chosen.jobs or 1)
    except SpecError as error:
        parser.error(str(error))
    except Stopped as stopped:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "stable-opd bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("spec", type=Path, metavar="SPEC", help="YAML file with config, axes, seeds and metrics")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of runs and results; runs/SPEC if left out")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time; 1 if left out")
    parser.add_argument(
        "--only", action="append", metavar="VARIANTS/seed-N", help="run this one alone, and write no tables; repeatable"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--dry-run", action="store_true", help="print the command of every run, and run none")
    mode.add_argument("--slurm", action="store_true", help="write a job array for sbatch, and run nothing here")
    mode.add_argument("--collect", action="store_true", help="write the tables of what is finished, and run nothing")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _run(spec: Spec, runs: Sequence[Run], out: Path, jobs: int | None) -> None:
    """Run what is not finished, if that is wanted; write the results in any case."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        if jobs is not None:
            execute(runs, jobs)
    finally:
        results = write(spec, runs, out)
    done = sum(each.status == "finished" for each in results)
    print(f"{done} of {len(results)} runs are finished; see {out / 'results.md'}.")
    _leave(results)


def write(spec: Spec, runs: Sequence[Run], out: Path) -> list[Result]:
    """Write tables and pictures of what the folders of the runs say, and return it."""
    results = collect(spec, runs)
    write_rows(out / "results.jsonl", results)
    write_table(out / "results.csv", spec, results)
    pictures: list[str] = []
    try:
        pictures = draw(spec, runs, results, out)
    except ModuleNotFoundError:
        print(WITHOUT_PLOT, file=sys.stderr)
    write_whole(out / "results.md", page(spec, results, pictures))
    for warning in unknown_columns(spec, runs, results):
        print(warning, file=sys.stderr)
    return results


def unknown_columns(spec: Spec, runs: Sequence[Run], results: Sequence[Result]) -> list[str]:
    """Return a warning per metric that no finished run has, with the nearest column that one has."""
    finished = [run for run, result in zip(runs, results, strict=True) if result.status == "finished"]
    found = []
    for name, metric in spec.metrics.items():
        if finished and all(each.metrics.get(name) is None for each in results):
            known = list((metric_rows(finished[0].folder) or [{}])[0])
            near = difflib.get_close_matches(metric.column, known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            found.append(f"Expected {metric.column!r} in metrics.csv for {name}, but got no run that has it.{meant}")
    return found


def _write_script(spec: Path, runs: Sequence[Run], out: Path, jobs: int | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    path = out / "array.sh"
    write_whole(path, script(runs, spec, out, jobs))
    print(f"sbatch {path}")


def _chosen(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    by_name = {run.name: run for run in runs}
    for name in names:
        if name not in by_name:
            raise SpecError(f"Expected a run out of {', '.join(by_name)}, but got {name!r}. Copy one of them.")
    return [by_name[name] for name in names]


def _leave(results: Sequence[Result]) -> None:
    """Exit with 1 if a run is not finished."""
    if any(each.status != "finished" for each in results):
        sys.exit(1)

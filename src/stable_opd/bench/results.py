"""What came out of a benchmark: a row per run, and what the rows of a combination say together."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stable_opd.bench.expand import Run
from stable_opd.bench.figures import figure
from stable_opd.bench.folder import metric_rows, read_record, write_whole
from stable_opd.bench.spec import Metric, Spec
from stable_opd.bench.statistics import deviation, mean, sign_flip


@dataclass(frozen=True)
class Result:
    """What is known of a run.

    Attributes:
        variants: Name of its variant, by axis.
        seed: Its seed.
        status: ``finished``, ``failed``, ``interrupted``, ``started``, ``outdated`` or ``missing``.
        metrics: Its figures, if it is finished; none where it did not log the column, infinity where a bound was never
            exceeded.
        reason: Why it failed.
        command: Its command line.
        seconds: How long it took.
        versions: Of the packages that matter.
        commit: Of the working directory.
        host: Names of CPU and GPUs.
    """

    variants: Mapping[str, str]
    seed: int
    status: str
    metrics: Mapping[str, float | None]
    reason: str | None
    command: str
    seconds: float | None = None
    versions: Mapping[str, str] | None = None
    commit: str | None = None
    host: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Cell:
    """A metric of a combination.

    Attributes:
        by_seed: Its values.
        never: How many further seeds stayed within the bound of `reduce: first`.
    """

    by_seed: Mapping[int, float]
    never: int = 0

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""
        return mean(list(self.by_seed.values())) if self.by_seed else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds."""
        return deviation(list(self.by_seed.values()))


@dataclass(frozen=True)
class Comparison:
    """Two combinations in one metric.

    Attributes:
        pairs: Seeds that both finished.
        difference: Mean of the paired differences.
        p: Of the sign-flip test, corrected for the number of tests if there are several.
    """

    pairs: int
    difference: float
    p: float


Cells = Mapping[str, Mapping[str, Cell]]


def collect(spec: Spec, runs: Sequence[Run]) -> list[Result]:
    """Return what the folders of runs say."""
    return [_result(spec, run) for run in runs]


def _result(spec: Spec, run: Run) -> Result:
    record = read_record(run.folder)
    if record is None or record.fingerprint != run.fingerprint:
        status = "missing" if record is None else "outdated"
        reason = "not run yet" if record is None else "it was made by another recipe or version"
        return Result(run.variants, run.seed, status, {}, reason, run.command)
    metrics: dict[str, float | None] = {}
    if record.status == "finished":
        rows = metric_rows(run.folder)
        metrics = {name: figure(rows, metric) for name, metric in spec.metrics.items()}
    return Result(
        run.variants,
        run.seed,
        record.status,
        metrics,
        record.reason,
        run.command,
        round(record.seconds, 1),
        **{name: record.environment.get(name) for name in ("versions", "commit", "host")},
    )


def cells(spec: Spec, results: Sequence[Result]) -> dict[str, dict[str, Cell]]:
    """Return the values of every metric by combination, in the order of the results."""
    found: dict[str, dict[str, Cell]] = {}
    for result in results:
        found.setdefault(combination(result.variants), {})
    for name in found:
        mine = [each for each in results if combination(each.variants) == name]
        found[name] = {metric: _cell(metric, what, mine) for metric, what in spec.metrics.items()}
    return found


def _cell(name: str, metric: Metric, results: Sequence[Result]) -> Cell:
    by_seed = {each.seed: value for each in results if (value := each.metrics.get(name)) is not None}
    if metric.reduce != "first":
        return Cell(by_seed)
    happened = {seed: value for seed, value in by_seed.items() if math.isfinite(value)}
    return Cell(happened, len(by_seed) - len(happened))


def combination(variants: Mapping[str, str]) -> str:
    """Return what a combination is called."""
    return " + ".join(variants.values())


def ranking(spec: Spec, found: Cells, metric: str) -> list[str]:
    """Return the combinations that have a metric, the best first; in their own order if none is better."""
    means = {name: row[metric].mean for name, row in found.items()}
    names = [name for name, value in means.items() if value is not None and not math.isnan(value)]
    better = spec.metrics[metric].better
    if better is None:
        return names
    return sorted(names, key=lambda name: means[name] or 0.0, reverse=better == "higher")


def compare(first: Cell, second: Cell) -> Comparison | None:
    """Return how two combinations differ on the seeds that both finished; none if there are none."""
    return _tested({"": _paired(first, second)}).get("")


def against_baseline(spec: Spec, found: Cells, metric: str) -> dict[str, Comparison]:
    """Return how every other combination differs from the baseline, with p-values corrected for their number."""
    if spec.baseline is None:
        return {}
    base = combination({axis: spec.baseline[axis] for axis in spec.axes})
    return _tested({name: _paired(row[metric], found[base][metric]) for name, row in found.items() if name != base})


def _paired(first: Cell, second: Cell) -> dict[int, float]:
    """Return the differences by seed; none if one is no number."""
    differences = {seed: first.by_seed[seed] - second.by_seed[seed] for seed in first.by_seed if seed in second.by_seed}
    return differences if all(map(math.isfinite, differences.values())) else {}


def _tested(differences: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    known = {name: each for name, each in differences.items() if each}
    p_values = sign_flip(list(known.values()))
    return {
        name: Comparison(len(each), mean(list(each.values())), p)
        for (name, each), p in zip(known.items(), p_values, strict=True)
    }


def best(spec: Spec, found: Cells, metric: str) -> str | None:
    """Return the combination to mark: the best, if it differs significantly from the baseline or the runner-up."""
    ranked = ranking(spec, found, metric)
    if spec.metrics[metric].better is None or len(ranked) < 2:
        return None
    if spec.baseline is not None:
        comparison = against_baseline(spec, found, metric).get(ranked[0])
    else:
        comparison = compare(found[ranked[0]][metric], found[ranked[1]][metric])
    return ranked[0] if comparison is not None and comparison.p <= spec.alpha else None


def write_rows(path: Path, results: Sequence[Result]) -> None:
    """Write one JSON object per run; what is no finite number becomes null."""
    lines = []
    for result in results:
        row = asdict(result)
        row["metrics"] = {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in row["metrics"].items()
        }
        lines.append(json.dumps(row) + "\n")
    write_whole(path, "".join(lines))


def write_table(path: Path, spec: Spec, results: Sequence[Result]) -> None:
    """Write a line per combination, with mean, standard deviation and number of seeds of every metric, as CSV."""
    found = cells(spec, results)
    names = {combination(each.variants): each.variants for each in results}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("mean", "std", "seeds")
    writer.writerow([*spec.axes, *(f"{metric}_{part}" for metric in spec.metrics for part in parts)])
    for name, row in found.items():
        figures = [(each.mean, each.deviation, len(each.by_seed)) for each in row.values()]
        flat = ["" if each is None else each for figure in figures for each in figure]
        writer.writerow([*names[name].values(), *flat])
    write_whole(path, text.getvalue())

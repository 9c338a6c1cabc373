"""The page of results, in Markdown."""

from collections.abc import Mapping, Sequence

from stable_opd.bench.results import (
    Cell,
    Cells,
    Result,
    against_baseline,
    best,
    cells,
    combination,
    compare,
    ranking,
)
from stable_opd.bench.spec import MATH, Metric, Spec
from stable_opd.bench.statistics import deviation, mean, smallest_p


def page(spec: Spec, results: Sequence[Result], pictures: Sequence[str] = ()) -> str:
    """Return results.md.

    Args:
        spec: The benchmark.
        results: A result per run.
        pictures: Files beside the page that it shows.
    """
    found = cells(spec, results)
    parts = [f"# {spec.path.stem}", _head(spec, results), main_table(spec, found)]
    if any(metric.better for metric in spec.metrics.values()):
        parts.append(significance(spec, found))
        if spec.baseline is not None:
            parts.append(baseline_table(spec, found))
    if spec.table == "math":
        parts += ["## Mathematics", "Per cent, mean ± standard deviation over seeds.", math_table(spec, found)]
    parts += [f"![{each}]({each})" for each in pictures]
    parts += _failures(results)
    parts += ["## Commands", *_commands(results)]
    return "\n\n".join(parts) + "\n"


def main_table(spec: Spec, found: Cells) -> str:
    """Return a row per combination and a column per metric; the marked ones are in bold."""
    marked = {metric: best(spec, found, metric) for metric in spec.metrics}
    rows = []
    for name, row in found.items():
        texts = [
            f"**{text(cell, len(spec.seeds))}**" if marked[metric] == name else text(cell, len(spec.seeds))
            for metric, cell in row.items()
        ]
        rows.append([name, *texts])
    return markdown([" + ".join(spec.axes), *spec.metrics], rows)


def significance(spec: Spec, found: Cells) -> str:
    """Return which test decides what is marked, and what it says of every metric."""
    side = "the baseline" if spec.baseline is not None else "the runner-up"
    number = ", with p-values corrected for the number of combinations (Westfall and Young)" if spec.baseline else ""
    chosen = " Best and runner-up are chosen by the data that tests them, so take a p-value near the limit as a hint."
    hint = "" if spec.baseline else chosen
    lines = [
        f"Bold: the best combination, if it differs from {side} by an exact two-sided sign-flip permutation test on "
        f"the differences paired by seed, p ≤ {spec.alpha:g}{number}.{hint}"
    ]
    for metric, what in spec.metrics.items():
        if what.better is not None:
            lines.append(f"- {metric} ({what.better} is better): {_verdict(spec, found, metric)}")
    return "\n".join([lines[0], "", *lines[1:]]).rstrip()


def _verdict(spec: Spec, found: Cells, metric: str) -> str:
    ranked = ranking(spec, found, metric)
    if len(ranked) < 2:
        return "fewer than two combinations have it."
    if spec.baseline is None:
        other, comparison = ranked[1], compare(found[ranked[0]][metric], found[ranked[1]][metric])
    else:
        other = combination({axis: spec.baseline[axis] for axis in spec.axes})
        if ranked[0] == other:
            return "the baseline itself is the best, so nothing is marked."
        comparison = against_baseline(spec, found, metric).get(ranked[0])
    if comparison is None:
        return f"{ranked[0]} and {other} have no seed in common."
    seeds = f"{comparison.pairs} seed{'s' * (comparison.pairs > 1)}"
    says = f"{ranked[0]} against {other}: difference {comparison.difference:+.3g} on {seeds}"
    least = smallest_p(comparison.pairs)
    if least > spec.alpha:
        return f"{says}. So few seeds cannot be significant: the smallest p-value possible is {least:.2g}."
    verdict = "significant" if comparison.p <= spec.alpha else "not significant"
    return f"{says}, p = {comparison.p:.3g}, {verdict}."


def baseline_table(spec: Spec, found: Cells) -> str:
    """Return the differences of all combinations to the baseline."""
    assert spec.baseline is not None
    base = combination({axis: spec.baseline[axis] for axis in spec.axes})
    by_metric = {name: against_baseline(spec, found, name) for name, each in spec.metrics.items() if each.better}
    rows = []
    for name in found:
        if name != base:
            pairs = [each.get(name) for each in by_metric.values()]
            rows.append(
                [name, *("-" if each is None else f"{each.difference:+.3g} (p = {each.p:.2g})" for each in pairs)]
            )
    return f"Differences to {base}:\n\n" + markdown([" + ".join(spec.axes), *by_metric], rows)


def math_table(spec: Spec, found: Cells) -> str:
    """Return the usual table for mathematics; a column without a metric of its name, in any spelling, stays empty."""
    named = {_plain(metric): metric for metric in spec.metrics}
    rows = []
    for name, row in found.items():
        parts = [row[named[_plain(column)]] if _plain(column) in named else Cell({}) for column in MATH]
        rows.append([name, *map(_percent, [*parts, _average(parts)])])
    return markdown([" + ".join(spec.axes), *MATH, "Avg."], rows)


def _average(parts: Sequence[Cell]) -> Cell:
    """Return the mean over the columns, of the seeds that have all of them: a mean over some would not compare."""
    seeds = [seed for seed in parts[0].by_seed if all(seed in each.by_seed for each in parts)]
    return Cell({seed: mean([each.by_seed[seed] for each in parts]) for seed in seeds})


def _percent(cell: Cell) -> str:
    if cell.mean is None:
        return ""
    spread = deviation(list(cell.by_seed.values()))
    return f"{100 * cell.mean:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _plain(name: str) -> str:
    return "".join(each for each in name.lower() if each.isalnum())


def text(cell: Cell, seeds: int) -> str:
    """Return mean and standard deviation; how many seeds there are, if fewer than there should be.

    Where a bound was not exceeded in some seeds: the mean over those in which it was, and how many these are.
    """
    measured = len(cell.by_seed) + cell.never
    lack = f" (n = {measured})" if measured < seeds else ""
    if cell.mean is None:
        return f"never{lack}" if cell.never else "-"
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.2g}"
    share = f" in {len(cell.by_seed)} of {measured}" if cell.never else ""
    return f"{cell.mean:.3g}{spread}{share}{lack}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(spec: Spec, results: Sequence[Result]) -> str:
    versions = {
        ", ".join(f"{name} {number}" for name, number in each.versions.items()) for each in results if each.versions
    }
    hosts = {", ".join([str(each.host["cpu"]), *each.host["gpu"]]) for each in results if each.host}
    commits = {each.commit for each in results if each.commit}
    done = sum(each.status == "finished" for each in results)
    seconds = sum(each.seconds or 0.0 for each in results)
    return "\n".join(
        [
            f"{_statistic(spec)} {done} of {len(results)} runs are finished; together they took "
            f"{seconds / 60:.1f} minutes.",
            "",
            *(f"- `{name}`: {describe(metric)}" for name, metric in spec.metrics.items()),
            "",
            f"Made by `stable-opd bench {spec.path}` with {' or '.join(sorted(versions)) or 'nothing yet'}"
            + (f", at commit {' or '.join(sorted(commits))}" if commits else "")
            + (f", on {' or '.join(sorted(hosts))}." if hosts else "."),
        ]
    )


def _statistic(spec: Spec) -> str:
    if len(spec.seeds) == 1:
        return f"One run of each, with seed {spec.seeds[0]}."
    return f"Mean ± standard deviation over seeds {', '.join(map(str, spec.seeds))}."


def describe(metric: Metric) -> str:
    """Return what a metric is, in words."""
    if metric.above is not None:
        return f"optimizer steps before {metric.column} first exceeds {metric.above:g}"
    words = {"last": "last", "max": "largest", "min": "smallest", "mean": f"mean of the last {metric.window} of"}
    return f"{words[metric.reduce]} {metric.column}"


def _failures(results: Sequence[Result]) -> list[str]:
    rows = [
        [f"{combination(each.variants)}, seed {each.seed}", each.status, _cell(each.reason or "")]
        for each in results
        if each.status != "finished"
    ]
    return ["## Not finished", markdown(["run", "status", "reason"], rows)] if rows else []


def _cell(words: str) -> str:
    return " ".join(words.replace("|", "\\|").split())


def _commands(results: Sequence[Result]) -> list[str]:
    """Return one command per combination; those of its other seeds differ in the seed and the folder only."""
    first: Mapping[str, Result] = {combination(each.variants): each for each in reversed(results)}
    names = dict.fromkeys(combination(each.variants) for each in results)
    listed = "\n".join(f"- {name}: `{first[name].command}`" for name in names)
    return ["One seed of each; `results.jsonl` has all.", listed]

"""Which curves are drawn together: plain data, nothing is drawn here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stable_opd.report.runs import Curves, Run
from stable_opd.report.text import number, one_line
from stable_opd.signals.changes import Array

#: More variants in one picture than this cannot be told apart.
MOST_VARIANTS = 12

#: The points of a curve with no more than these are marked.
SPARSE = 25

#: Characters of a label that fit beside a picture.
LONGEST_LABEL = 16

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Line:
    """A curve, and the range over seeds if there are several.

    Attributes:
        label: What stands at its end.
        place: Which of the variants or of the plan's curves it is: it decides the look, the same in all panels.
        steps: Steps, (n,).
        values: Mean over the seeds, (n,).
        low: Least over the seeds, (n,).
        high: Largest over the seeds, (n,).
        seeds: How many runs it is the mean of.
        sparse: Whether its points are to be marked, because there are few.
        joined: Whether a curve through its points says something; not if they are few, by chance.
    """

    label: str
    place: int
    steps: Array
    values: Array
    low: Array
    high: Array
    seeds: int = 1
    sparse: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """Curves with common axes.

    Attributes:
        key: Name of its file.
        title: What it shows.
        lines: The curves.
        share: Whether the values are shares, from 0 to 1.
        marks: Steps to mark, with what happened there.
    """

    key: str
    title: str
    lines: Sequence[Line]
    share: bool = False
    marks: Sequence[tuple[int, str]] = ()

    @property
    def alt(self) -> str:
        """The curves in words."""
        told = [
            f"{line.label} goes from {number(line.values[0])} to {number(line.values[-1])}, "
            f"between {number(float(np.nanmin(line.values)))} and {number(float(np.nanmax(line.values)))}"
            for line in self.lines
        ]
        marked = [f"{what} at step {step}" for step, what in self.marks]
        return f"{self.title}, by optimizer step. {'; '.join([*told, *marked])}."


@dataclass(frozen=True)
class Heat:
    """How far student and teacher are apart by position and step.

    Attributes:
        key: Name of its file.
        title: What it shows.
        steps: Steps, (n,).
        values: KL(student || teacher) in nats, by tenth of the token budget and step, (bins, n); nan where no answer
            was that long.
    """

    key: str
    title: str
    steps: Array
    values: Array

    @property
    def alt(self) -> str:
        """The map in words."""
        first, last = (number(float(np.nanmean(self.values[:, part]))) for part in (slice(0, 10), slice(-10, None)))
        return f"{self.title}: {first} nats on average in the first ten logged steps, {last} in the last ten."


@dataclass(frozen=True)
class Plan:
    """A panel to make if the runs logged what it shows.

    Attributes:
        key: Name of its file.
        title: What it shows.
        columns: Label, split and column of each curve; a column that ends in a slash stands for all below it.
        share: Whether the values are shares.
    """

    key: str
    title: str
    columns: Sequence[tuple[str, Split, str]]
    share: bool = False


PLANS = (
    Plan(
        "truncation-repetition",
        "Truncated and repetitive answers",
        [
            ("truncated", "train", "train/truncation_rate"),
            ("repetitive", "train", "train/repetition_rate"),
            ("truncated (val.)", "validation", "val/truncation_rate"),
        ],
        share=True,
    ),
    Plan(
        "length",
        "Length of the answers, in tokens",
        [
            ("mean", "train", "train/length_mean"),
            ("95th percentile", "train", "train/length_p95"),
            ("mean (val.)", "validation", "val/length_mean"),
        ],
    ),
    Plan(
        "accuracy",
        "Validation accuracy",
        [("greedy", "validation", "val/accuracy"), ("sampled", "validation", "val/sampled/accuracy")],
        share=True,
    ),
    Plan(
        "advantages",
        "Teacher's advantage by kind of token",
        [
            ("repeated tokens", "train", "train/advantage_repeated"),
            ("regular tokens", "train", "train/advantage_regular"),
        ],
    ),
    Plan("repeated-share", "Share of repeated tokens", [("repeated", "train", "train/repeated_share")], share=True),
    Plan(
        "rollout-level",
        "Mean log-probs and advantage",
        [
            ("advantage", "train", "train/advantage_mean"),
            ("student log-prob", "train", "train/logprob_student"),
            ("teacher log-prob", "train", "train/logprob_teacher"),
        ],
    ),
    Plan("stop-hazard", "Stop hazard: chance to stop, per token", [("student", "train", "train/stop_hazard")]),
    Plan(
        "entropy",
        "Entropy, in nats",
        [("student", "train", "train/entropy_student"), ("teacher", "train", "train/entropy_teacher")],
    ),
    Plan(
        "log-ratio",
        "Log-ratio tail, teacher to student",
        [
            ("99th percentile", "train", "train/log_ratio_p99"),
            ("95th percentile", "train", "train/log_ratio_p95"),
        ],
    ),
    Plan("losses", "Loss terms", [("", "train", "train/loss/")]),
    Plan(
        "gradients",
        "Gradient norm",
        [("all terms", "train", "train/grad_norm"), ("", "train", "train/gradient_norm/")],
    ),
    Plan("cosines", "Cosines between gradients of terms", [("", "train", "train/gradient_cosine/")]),
)


def variants(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs by variant: those whose names differ in a seed alone belong together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return {runs[0].name if len(runs) == 1 else variant: runs for variant, runs in found.items()}


def panels(runs: Sequence[Run], marks: Sequence[tuple[int, str]] = ()) -> list[Panel]:
    """Return the panels of some runs.

    One variant has the curves of a plan in one panel; several are laid over each other, with a panel for each curve.

    Args:
        runs: The runs.
        marks: Steps to mark, with what happened there.
    """
    groups = dict(list(variants(runs).items())[:MOST_VARIANTS])
    if len(groups) == 1:
        ((_, seeds),) = groups.items()
        made = [_of_one(plan, seeds, marks) for plan in PLANS]
    else:
        made = [panel for plan in PLANS for panel in _of_many(plan, groups)]
    return [panel for panel in made if panel.lines]


def heats(runs: Sequence[Run]) -> list[Heat]:
    """Return the map of each variant's first run that logged divergences by position."""
    found: list[Heat] = []
    for name, seeds in list(variants(runs).items())[:MOST_VARIANTS]:
        names = sorted(seeds[0].train.named("train/kl_by_position/"), key=lambda each: int(each.rpartition("/")[2]))
        if names:
            values = np.stack([seeds[0].train[each] for each in names])
            title = "KL(student || teacher) by position" + (f": {one_line(name, 34)}" if len(runs) > 1 else "")
            found.append(Heat(f"kl-by-position-{len(found)}", title, seeds[0].train.steps, values))
    return found


def line(label: str, place: int, curves: Sequence[Curves], column: str) -> Line | None:
    """Return the mean of a column over seeds with its range, as far as all of them got; None if there is nothing.

    At a step that some of them did not measure it is the mean of the others. A nan breaks the curve where nothing was
    measured for much longer than usual.
    """
    there = [each for each in curves if each.has(column)]
    if not there:
        return None
    end = min(float(each.steps[-1]) for each in there)
    tables = [_measured(each, column) for each in there]
    steps = np.array(sorted({step for table in tables for step in table if step <= end}))
    if not len(steps):
        return None
    values = np.array([[table.get(step, np.nan) for step in steps.tolist()] for table in tables])
    curve = np.stack([steps, np.nanmean(values, 0), np.nanmin(values, 0), np.nanmax(values, 0)])
    gaps = np.diff(steps)
    if len(gaps):
        curve = np.insert(curve, np.flatnonzero(gaps > 3 * np.median(gaps)) + 1, np.nan, axis=1)
    sparse = len(steps) <= SPARSE
    dense = 2 * len(steps) >= min(len(each.steps) for each in there)
    joined = dense or not sparse or len(gaps) == 0 or bool(gaps.max() <= 1.5 * gaps.min())
    return Line(label, place, curve[0], curve[1], curve[2], curve[3], len(tables), sparse, joined)


def _measured(curves: Curves, column: str) -> dict[float, float]:
    """Return the finite values of a column by their steps."""
    values = curves[column]
    there = np.isfinite(values)
    return dict(zip(curves.steps[there].tolist(), values[there].tolist(), strict=True))


def _of_one(plan: Plan, seeds: Sequence[Run], marks: Sequence[tuple[int, str]]) -> Panel:
    made = [
        line(label, place, [getattr(run, split) for run in seeds], column)
        for place, (label, split, column) in enumerate(_resolved(plan.columns, seeds))
    ]
    return Panel(plan.key, plan.title, [each for each in made if each], plan.share, marks)


def _of_many(plan: Plan, groups: Mapping[str, Sequence[Run]]) -> Iterable[Panel]:
    columns = _resolved(plan.columns, [run for seeds in groups.values() for run in seeds])
    for number_, (label, split, column) in enumerate(columns):
        made = [
            line(one_line(name, LONGEST_LABEL), place, [getattr(run, split) for run in seeds], column)
            for place, (name, seeds) in enumerate(groups.items())
        ]
        title = plan.title if len(columns) == 1 else f"{plan.title}: {label}"
        yield Panel(f"{plan.key}-{number_}", title, [each for each in made if each], plan.share)


def _resolved(columns: Sequence[tuple[str, Split, str]], runs: Sequence[Run]) -> list[tuple[str, Split, str]]:
    """Return the columns, with those below a slash named after what follows it."""
    found: list[tuple[str, Split, str]] = []
    for label, split, column in columns:
        if not column.endswith("/"):
            found.append((label, split, column))
            continue
        below = dict.fromkeys(name for run in runs for name in getattr(run, split).named(column))
        found += [(one_line(name.removeprefix(column), LONGEST_LABEL), split, name) for name in below]
    return found

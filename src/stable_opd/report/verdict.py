"""What happened in a run: the signals that moved, and one sentence. Pure functions of the curves."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stable_opd.report.runs import Curves, Run
from stable_opd.signals.changes import CLEAR, LASTING, QUIET, Array, Change, first_reaching
from stable_opd.signals.watch import SIGNALS, Signal, Watch

Kind = Literal["stable", "inflating", "collapsed", "recovered", "too short to say"]

#: Truncation above which a run has collapsed.
COLLAPSED = 0.9
#: Truncation or repetition above the quiet level by this much, or answers this many times longer, are inflation.
MORE, LONGER = 0.1, 1.5
#: Training steps at the end that say how a run ended.
LAST = 10
#: Training steps below which there is nothing to say.
ENOUGH = QUIET + LAST


@dataclass(frozen=True)
class Sign:
    """A signal that changed.

    Attributes:
        signal: Which.
        change: When, and how far.
    """

    signal: Signal
    change: Change


@dataclass(frozen=True)
class Verdict:
    """What became of a run.

    Attributes:
        kind: The class.
        reason: Why, as the rest of a sentence that begins with the class.
        signs: The signals that changed, by the step at which they began.
        collapsed_at: Step at which truncation passed `COLLAPSED`, if it did.
    """

    kind: Kind
    reason: str
    signs: Sequence[Sign] = ()
    collapsed_at: int | None = None

    @property
    def sentence(self) -> str:
        """The class with its reason."""
        return f"{self.kind.capitalize()}: {self.reason}"

    @property
    def first(self) -> Sign | None:
        """The earliest change among the signals that speak about loops and length."""
        return next((each for each in self.signs if each.signal.specific), None)


@dataclass(frozen=True)
class Levels:
    """How a curve began and ended, and its largest mean over a few measurements.

    Attributes:
        quiet: Mean of the first measurements.
        last: Mean of the last ones.
        peak: Largest mean of a window of measurements.
        noise: Standard deviation of the first measurements.
        end: Mean of the last few measurements, for what still rises. All are nan if nothing was measured.
    """

    quiet: float
    last: float
    peak: float
    noise: float = 0.0
    end: float = np.nan


def levels(values: Array, quiet: int = QUIET, lasting: int = LASTING, last: int = LAST) -> Levels:
    """Return how a curve began and ended, and how high it got; nan measurements do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Levels(np.nan, np.nan, np.nan, np.nan, np.nan)
    width = min(lasting, len(values))
    means = np.convolve(values, np.full(width, 1 / width), "valid")
    first = values[:quiet]
    noise = float(first.std(ddof=1)) if len(first) > 1 else 0.0
    return Levels(float(first.mean()), float(values[-last:].mean()), float(means.max()), noise, float(means[-1]))


def find_signs(train: Curves) -> list[Sign]:
    """Return the signals that changed, by the step at which they began."""
    found = []
    for signal in SIGNALS:
        watch, columns = Watch(signal), {name: train[name].tolist() for name in signal.columns}
        for place, step in enumerate(train.steps.tolist()):
            watch.observe(int(step), {name: column[place] for name, column in columns.items()})
        if watch.change:
            found.append(Sign(signal, watch.change))
    return sorted(found, key=lambda sign: sign.change.start)


def classify(truncation: Levels, length: Levels, repetition: Levels) -> Kind:
    """Return the class of a run that is long enough.

    Collapsed: truncation got above `COLLAPSED`. Inflating: at the end truncation or repetition is above its quiet level
    by `MORE`, or the answers are `LONGER` times as long as in the beginning, and in either case by `CLEAR` standard
    deviations of the quiet phase. Recovered: one of the two held on the way
    and neither truncation, repetition nor length is up by as much at the end. Stable: none of it.
    """

    def up(reached: Callable[[Levels], float]) -> bool:
        least = [(truncation, MORE), (repetition, MORE), (length, (LONGER - 1) * length.quiet)]
        return any(reached(each) - each.quiet >= max(by, CLEAR * each.noise) for each, by in least)

    ended_up = up(lambda each: each.last) or up(lambda each: each.end)
    collapsed = truncation.peak > COLLAPSED
    if collapsed and (ended_up or truncation.last > COLLAPSED):
        return "collapsed"
    if ended_up:
        return "inflating"
    return "recovered" if collapsed or up(lambda each: each.peak) else "stable"


def judge(run: Run) -> Verdict:
    """Return what became of a run: by its training rows, or by evaluations if the student wrote nothing in training."""
    if not run.train.has("train/truncation_rate"):
        return _by_evaluations(run)
    measured = int(np.isfinite(run.train["train/truncation_rate"]).sum())
    if measured < ENOUGH:
        return Verdict(
            "too short to say",
            f"{measured} training steps were logged, and {ENOUGH} are the least that can be judged.",
        )
    train = run.train
    truncation, length, repetition = (
        levels(train[f"train/{name}"]) for name in ("truncation_rate", "length_mean", "repetition_rate")
    )
    kind = classify(truncation, length, repetition)
    signs = find_signs(train)
    reached = first_reaching(train.steps, train["train/truncation_rate"], COLLAPSED)
    verdict = Verdict(kind, "", signs, reached)
    reasons = {
        "collapsed": _collapse,
        "inflating": _inflation,
        "recovered": _recovery,
        "stable": _calm,
    }[kind](verdict, truncation, length)
    return Verdict(kind, f"{reasons}{_accuracy(run.validation)}.", signs, reached)


def _collapse(verdict: Verdict, truncation: Levels, length: Levels) -> str:
    if truncation.quiet > COLLAPSED:
        return (
            f"truncation was {truncation.quiet:.2f} in the first {QUIET} steps already, so the initial student does "
            "not stop within the token budget"
        )
    return f"truncation passed {COLLAPSED:g} at step {verdict.collapsed_at}{_first(verdict)}"


def _inflation(verdict: Verdict, truncation: Levels, length: Levels) -> str:
    told = f"truncation went from {truncation.quiet:.2f} to {truncation.last:.2f}"
    if truncation.peak - truncation.last >= MORE:
        told += f" after {truncation.peak:.2f}"
    if np.isfinite(length.quiet):
        told += f" and the mean length from {length.quiet:.0f} to {length.last:.0f} tokens"
    return f"{told}{_first(verdict)}"


def _recovery(verdict: Verdict, truncation: Levels, length: Levels) -> str:
    came = f"truncation came back to {truncation.last:.2f} after {truncation.peak:.2f}"
    if truncation.peak - truncation.quiet < MORE:
        came = f"the mean length came back to {length.last:.0f} tokens after {length.peak:.0f}"
    return f"{came}{_first(verdict)}"


def _calm(verdict: Verdict, truncation: Levels, length: Levels) -> str:
    told = f"truncation stayed at {_share(truncation.peak)}"
    if truncation.last - truncation.quiet <= -MORE:
        told = f"truncation went from {truncation.quiet:.2f} to {truncation.last:.2f}"
    if np.isfinite(length.quiet):
        told += f", and the mean length went from {length.quiet:.0f} to {length.last:.0f} tokens"
    return told


def _share(value: float) -> str:
    """Return an upper bound of a share in two digits."""
    return "0" if value == 0 else f"{math.ceil(100 * value - 1e-9) / 100:.2f} or below"


def _first(verdict: Verdict) -> str:
    """Return the clause about the first sign; nothing if there was none."""
    first = verdict.first
    if first is None:
        return ""
    return f"; the first sign was {first.signal.name}, which began to {first.signal.verb} at step {first.change.start}"


def _accuracy(validation: Curves) -> str:
    """Return the clause about accuracy; nothing if it was not measured twice."""
    values = validation["val/accuracy"]
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return ""
    return f"; validation accuracy went from {values[0]:.2f} to {values[-1]:.2f}"


def _by_evaluations(run: Run) -> Verdict:
    """Judge a run in whose training the student wrote nothing: the first evaluation is the quiet phase."""
    validation = run.validation
    truncation, length, repetition = (
        levels(validation[f"val/{name}"], 1, 1, 1) for name in ("truncation_rate", "length_mean", "repetition_rate")
    )
    measured = int(np.isfinite(validation["val/truncation_rate"]).sum())
    if measured < 3:
        return Verdict(
            "too short to say",
            f"the student's truncation was measured in no training step and in {measured} "
            "evaluations, and 3 are the least that can be judged.",
        )
    kind = classify(truncation, length, repetition)
    told = "by the evaluations alone, "
    if kind == "stable":
        told += f"truncation stayed at {_share(truncation.peak)}"
    else:
        told += f"truncation went from {truncation.quiet:.2f} to {truncation.last:.2f}, at most {truncation.peak:.2f}"
    return Verdict(kind, f"{told}{_accuracy(validation)}.")

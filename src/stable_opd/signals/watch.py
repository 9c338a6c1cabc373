"""The signals, and watching them in the course of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stable_opd.signals.changes import Change, Departures, Detector, Effect


@dataclass(frozen=True)
class Signal:
    """Something to watch.

    Attributes:
        name: What it is called in a sentence.
        effect: The smallest change that matters.
        columns: Where it is logged. Of several, what counts is the least departure, in quiet standard deviations.
        specific: Whether it speaks about loops and length. The others move in healthy runs too and are never the first
            sign.
    """

    name: str
    effect: Effect
    columns: tuple[str, ...]
    specific: bool = True

    @property
    def verb(self) -> str:
        """What it does when it changes."""
        return self.effect.direction


#: In the order in which they are expected to move before a collapse.
SIGNALS = (
    Signal("the stop hazard", Effect("fall", relative=0.2), ("train/stop_hazard",)),
    Signal("the share of repeated tokens", Effect("rise", absolute=0.02), ("train/repeated_share",)),
    Signal(
        "the mean advantage together with the length",
        Effect("rise", absolute=4.0),
        ("train/advantage_mean", "train/length_mean"),
    ),
    Signal("the length", Effect("rise", relative=0.25), ("train/length_mean",)),
    Signal("truncation", Effect("rise", absolute=0.1), ("train/truncation_rate",)),
    Signal("repetition", Effect("rise", absolute=0.02), ("train/repetition_rate",)),
    Signal("the log-ratio tail", Effect("rise", relative=0.5), ("train/log_ratio_p99",), specific=False),
    Signal("the entropy", Effect("rise", relative=0.5), ("train/entropy_student",), specific=False),
    Signal("the entropy", Effect("fall", relative=0.5), ("train/entropy_student",), specific=False),
    Signal("the gradient norm", Effect("rise", relative=1.0), ("train/grad_norm",), specific=False),
)


class Watch:
    """Watches a signal through the figures of each step.

    Args:
        signal: What to watch.
    """

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.detector = Detector(signal.effect)
        self._departures = Departures(len(signal.columns))

    @property
    def change(self) -> Change | None:
        """The first lasting change; None if there is none yet."""
        return self.detector.change

    def observe(self, step: int, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step; without one of the signal's it says nothing."""
        values = [figures.get(column, float("nan")) for column in self.signal.columns]
        known = self._departures.observe(step, values) if len(values) > 1 else [(step, values[0])]
        for at, value in known:
            self.detector.observe(at, value)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and lists of them, for checkpoints."""
        return {"detector": self.detector.state_dict(), "departures": self._departures.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.detector.load_state_dict(state["detector"])
        self._departures.load_state_dict(state["departures"])

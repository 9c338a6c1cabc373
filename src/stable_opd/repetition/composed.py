"""Detectors made of detectors."""

from torch import nn

from stable_opd.repetition.base import RepetitionDetector
from stable_opd.types import Repetition, Rollout


class _Composed(RepetitionDetector):
    def __init__(self, detectors: list[RepetitionDetector]) -> None:
        super().__init__()
        if not detectors:
            raise ValueError(f"Expected at least one detector in {type(self).__name__}, but got none. Name some.")
        self.detectors = nn.ModuleList(detectors)


class AnyOf(_Composed):
    """What at least one of several detectors finds: the union of their marks and of their flags.

    Use it where loops of several sorts occur, such as exact ones and ones with a counter. `AllOf` is the strict one.

    Source: of this project.

    Args:
        detectors: The detectors that are asked, at least one.
    """

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the tokens that some detector marks, and the rows that some detector flags."""
        in_loop, repetitive = self.detectors[0](rollout)
        for detector in self.detectors[1:]:
            found = detector(rollout)
            in_loop, repetitive = in_loop | found.in_loop, repetitive | found.repetitive
        return Repetition(in_loop, repetitive)


class AllOf(_Composed):
    """What all of several detectors find: the intersection of their marks and of their flags.

    Use it where one detector alone raises false alarms. Detectors may flag the same row and mark different tokens of
    it; that row is then flagged and has no marks. `AnyOf` is the lenient one.

    Source: of this project.

    Args:
        detectors: The detectors that are asked, at least one.
    """

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the tokens that all detectors mark, and the rows that all of them flag."""
        in_loop, repetitive = self.detectors[0](rollout)
        for detector in self.detectors[1:]:
            found = detector(rollout)
            in_loop, repetitive = in_loop & found.in_loop, repetitive & found.repetitive
        return Repetition(in_loop, repetitive)

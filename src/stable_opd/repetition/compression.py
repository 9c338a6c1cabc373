"""Repetition as compressibility."""

import zlib

import torch

from stable_opd.repetition.base import RepetitionDetector
from stable_opd.types import Repetition, Rollout


def compression_ratio(text: str) -> float:
    """Return how many times smaller zlib (level 9) makes the UTF-8 bytes of a text; 0.0 for an empty one."""
    # A lone surrogate cannot be encoded strictly, and a model may write one byte by byte.
    data = text.encode("utf-8", errors="replace")
    return len(data) / len(zlib.compress(data, 9)) if data else 0.0


def is_compressible(text: str, window: int, threshold: float) -> bool:
    """Whether a text is longer than ``window`` characters and its last ones compress by more than ``threshold``."""
    return len(text) > window and compression_ratio(text[-window:]) > threshold


class ZlibRepetition(RepetitionDetector):
    """The paper's rule: the last characters of a long answer compress by more than a threshold.

        repetitive(o) = len(o) > window and |tail| / |zlib(tail)| > threshold,  tail = last `window` characters

    A text that is not longer than the window is never repetitive, so small token budgets need a smaller window and,
    because short texts compress less, a smaller threshold (about 3 at 128 characters). The rule speaks about
    characters; the marks per token cover the row's last tokens in proportion. `PeriodicSuffix` marks tokens exactly.

    Source: Luo et al. 2026 (arXiv 2604.08527), section on metrics.

    Args:
        window: Characters at the end of the answer that are looked at.
        threshold: Compression ratio above which they count as repetitive.
    """

    def __init__(self, window: int = 10_000, threshold: float = 10.0) -> None:
        super().__init__()
        self.window = window
        self.threshold = threshold

    def forward(self, rollout: Rollout) -> Repetition:
        """Return the flags of the rows, and marks on the last tokens of the flagged ones."""
        flags = [is_compressible(text, self.window, self.threshold) for text in rollout.texts]
        device = rollout.lengths.device
        shares = [self.window / len(text) if flag else 0.0 for text, flag in zip(rollout.texts, flags, strict=True)]
        marked = (rollout.lengths * torch.tensor(shares, dtype=torch.float64, device=device)).ceil().long()
        in_loop = rollout.position >= (rollout.lengths - marked)[rollout.row]
        return Repetition(in_loop, torch.tensor(flags, dtype=torch.bool, device=device))

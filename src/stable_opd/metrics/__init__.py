"""torchmetrics that track length inflation; every one adds up over processes."""

from stable_opd.metrics.advantage import LogRatioTail, RepeatedAdvantage
from stable_opd.metrics.length import LengthInflation, ResponseLength
from stable_opd.metrics.rates import RepetitionRate, TruncationRate
from stable_opd.metrics.samples import PassAtK

__all__ = [
    "LengthInflation",
    "LogRatioTail",
    "PassAtK",
    "RepeatedAdvantage",
    "RepetitionRate",
    "ResponseLength",
    "TruncationRate",
]

"""The metrics of a training step and of an evaluation, under the names by which they are logged."""

from torchmetrics import MetricCollection

from stable_opd.metrics.advantage import LogRatioTail, RepeatedAdvantage
from stable_opd.metrics.base import Accuracy
from stable_opd.metrics.length import LengthInflation, ResponseLength
from stable_opd.metrics.rates import RepetitionRate, TruncationRate


def training_metrics(max_length: int) -> MetricCollection:
    """Return what is measured on the rollouts of each step; its values are those of the step, over all processes.

    Args:
        max_length: Token budget of an answer.
    """
    return MetricCollection(
        {
            "truncation_rate": TruncationRate(),
            "repetition_rate": RepetitionRate(),
            "length": ResponseLength(max_length),
            "length_inflation": LengthInflation(),
            "advantage": RepeatedAdvantage(),
            "log_ratio_p99": LogRatioTail(),
        },
        prefix="train/",
        compute_groups=False,
    )


def evaluation_metrics(max_length: int) -> MetricCollection:
    """Return what is measured on answers to evaluation prompts.

    Args:
        max_length: Token budget of an answer.
    """
    return MetricCollection(
        {
            "accuracy": Accuracy(),
            "truncation_rate": TruncationRate(),
            "repetition_rate": RepetitionRate(),
            "length": ResponseLength(max_length),
        },
        compute_groups=False,
    )

"""The metrics of a training step and of an evaluation, under the names by which they are logged."""

from torchmetrics import Metric, MetricCollection

from stable_opd.metrics.advantage import LogRatioTail, RepeatedAdvantage
from stable_opd.metrics.base import Accuracy
from stable_opd.metrics.length import LengthInflation, ResponseLength
from stable_opd.metrics.rates import RepetitionRate, TruncationRate
from stable_opd.metrics.samples import PassAtK


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


def evaluation_metrics(max_length: int, samples: int = 1) -> MetricCollection:
    """Return what is measured on answers to evaluation prompts.

    Args:
        max_length: Token budget of an answer.
        samples: Answers to each prompt.
    """
    several: dict[str, Metric | MetricCollection] = {"pass_at_k": PassAtK(samples)} if samples > 1 else {}
    return MetricCollection(
        {
            "accuracy": Accuracy(),
            "finished_accuracy": Accuracy(),
            "truncation_rate": TruncationRate(),
            "repetition_rate": RepetitionRate(),
            "length": ResponseLength(max_length),
            **several,
        },
        compute_groups=False,
    )

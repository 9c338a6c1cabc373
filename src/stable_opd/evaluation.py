"""Grading answers and measuring them, for validation and test."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from stable_opd.metrics.collections import evaluation_metrics
from stable_opd.repetition import RepetitionDetector
from stable_opd.samplers import Sampler, Temperature
from stable_opd.types import Prompts, Repetition, Rollout


def grades(prompts: Prompts, rollout: Rollout) -> list[float]:
    """Return the grade of each row, which answers the prompt of its number; empty if there is no task."""
    if prompts.task is None:
        return []
    places = rollout.prompt.tolist()
    return [prompts.task.grade(text, prompts.fields[place]) for text, place in zip(rollout.texts, places, strict=True)]


def records(
    prompts: Prompts,
    rollout: Rollout,
    repetition: Repetition,
    graded: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    """Return one record for each answer, in the order of the rows: the fields of its prompt, and what became of it.

    Args:
        prompts: What was answered, one row each.
        rollout: The answers.
        repetition: What the detector said of them.
        graded: The grade of each answer; empty if there is no task.
        tokenizer: Turns token ids into text.
    """
    columns = {
        "index": prompts.index,
        "completion": rollout.texts,
        "tokens": rollout.lengths.tolist(),
        "truncated": rollout.truncated.tolist(),
        "repetitive": repetition.repetitive.tolist(),
        "repeated_from": repeated_from(rollout, repetition, tokenizer),
    }
    columns |= {"grade": graded} if graded else {}
    answers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{**fields, **answer} for fields, answer in zip(prompts.fields, answers, strict=True)]


def repeated_from(rollout: Rollout, repetition: Repetition, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """Return how many characters of each answer stand before its first repeated token; None if it has none."""
    tokens, marks = rollout.completion.tolist(), repetition.in_loop.tolist()
    found: list[int | None] = []
    start = 0
    for length in rollout.lengths.tolist():
        end = start + length
        first = next((place for place in range(start, end) if marks[place]), None)
        before = None if first is None else tokenizer.decode(tokens[start:first], skip_special_tokens=True)
        found.append(None if before is None else len(before))
        start = end
    return found


class Evaluation(nn.Module):
    """Two sets of answers to each prompt, greedy and at a temperature, and what is measured on them.

    Args:
        max_length: Token budget of an answer.
        temperature: Temperature of the second set.
    """

    def __init__(self, max_length: int, temperature: float) -> None:
        super().__init__()
        self.samplers: dict[str, Sampler] = {"": Temperature(0.0), "sampled/": Temperature(temperature)}
        # A list, because a module's child may not have the empty name of the greedy set.
        self.metrics = nn.ModuleList([evaluation_metrics(max_length) for _ in self.samplers])

    def sets(self) -> Iterator[tuple[Sampler, MetricCollection]]:
        """Return how each set is drawn, and where it is counted."""
        return zip(self.samplers.values(), self.metrics, strict=True)  # type: ignore[arg-type]

    def measure(
        self, metrics: MetricCollection, prompts: Prompts, rollout: Rollout, detector: RepetitionDetector
    ) -> tuple[Repetition, list[float]]:
        """Count the answers of a batch in one of the sets; return what repeats in them, and their grades."""
        found, graded = detector(rollout), grades(prompts, rollout)
        metrics["truncation_rate"].update(rollout.truncated)
        metrics["repetition_rate"].update(found.repetitive)
        metrics["length"].update(rollout.lengths)
        if prompts.task is not None:
            metrics["accuracy"].update(torch.tensor(graded, device=rollout.lengths.device))
        return found, graded

    def compute(self) -> dict[str, Tensor]:
        """Return all figures, over all processes, and forget the answers."""
        figures: dict[str, Tensor] = {}
        for prefix, metrics in zip(self.samplers, self.metrics, strict=True):
            values = {name: metric.compute() for name, metric in metrics.items() if metric.update_called}  # type: ignore[operator]
            values |= values.pop("length", {})
            figures |= {prefix + name: value for name, value in values.items()}
            metrics.reset()  # type: ignore[operator]
        return figures

"""Grading answers and measuring them, for validation and test."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from stable_opd.metrics.collections import evaluation_metrics
from stable_opd.options import EvaluationOptions
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
    name = prompts.evaluation.name if prompts.evaluation else ""
    origin = {"set": name} if name else {}
    answers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [{**fields, **origin, **answer} for fields, answer in zip(prompts.fields, answers, strict=True)]


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


class AnswerSet(NamedTuple):
    """Answers that are drawn in one way and counted together.

    Attributes:
        name: Name of the evaluation set; empty if there is but one without a name.
        kind: Empty for greedy answers, ``sampled/`` for others; what stands before the names of their metrics.
        sampler: How they are drawn.
        samples: Answers to each prompt.
    """

    name: str
    kind: str
    sampler: Sampler
    samples: int


class Evaluation:
    """What is measured on answers to evaluation prompts: greedy ones, and ones that are sampled.

    A plain object: the metrics are made where the first answers are, and last until they are computed.

    Args:
        max_length: Token budget of an answer.
        temperature: Temperature of the sampled answers, where a set of prompts has none of its own.
    """

    def __init__(self, max_length: int, temperature: float) -> None:
        self.max_length, self.temperature = max_length, temperature
        self.metrics: dict[tuple[str, str], MetricCollection] = {}

    def sets(self, prompts: Prompts) -> list[AnswerSet]:
        """Return which answers to a batch of prompts are asked for, the greedy ones first."""
        asked = prompts.evaluation or EvaluationOptions()
        temperature = self.temperature if asked.temperature is None else asked.temperature
        greedy = AnswerSet(asked.name, "", Temperature(0.0), 1)
        sampled = AnswerSet(asked.name, "sampled/", Temperature(temperature), asked.samples)
        return [greedy, sampled] if asked.samples else [greedy]

    def measure(
        self, answers: AnswerSet, prompts: Prompts, rollout: Rollout, detector: RepetitionDetector
    ) -> tuple[Repetition, list[float]]:
        """Count the answers to a batch; return what repeats in them, and their grades.

        Args:
            answers: Which answers they are.
            prompts: What is answered.
            rollout: The answers; those to one prompt stand together.
            detector: Says what repeats in them.
        """
        found, graded = detector(rollout), grades(prompts, rollout)
        key = answers.name, answers.kind
        if key not in self.metrics:
            self.metrics[key] = evaluation_metrics(self.max_length, answers.samples).to(rollout.lengths.device)
        metrics = self.metrics[key]
        metrics["truncation_rate"].update(rollout.truncated)
        metrics["repetition_rate"].update(found.repetitive)
        metrics["length"].update(rollout.lengths)
        if prompts.task is not None:
            marks = torch.tensor(graded, device=rollout.lengths.device)
            metrics["accuracy"].update(marks)
            metrics["finished_accuracy"].update(marks * ~rollout.truncated)
            if "pass_at_k" in metrics:
                metrics["pass_at_k"].update(marks.view(-1, answers.samples))
        return found, graded

    def compute(self) -> dict[str, Tensor]:
        """Return all figures, over all processes, and forget the answers.

        Those of a set with a name stand under it; without a name before them stand the means over all sets, of the
        figures that all of them have.
        """
        figures: dict[str, dict[str, Tensor]] = {}
        for (name, kind), metrics in self.metrics.items():
            values = {each: metric.compute() for each, metric in metrics.items() if metric.update_called}
            for several in ("length", "pass_at_k"):
                values |= values.pop(several, {})
            mine = figures.setdefault(name, {})
            mine |= {kind + each: value for each, value in values.items()}
        self.metrics = {}
        named = {f"{name}/{each}": value for name, mine in figures.items() if name for each, value in mine.items()}
        return means(list(figures.values())) | named


def means(sets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean over some sets of each figure that all of them have; of a maximum, the maximum."""
    common = [name for name in sets[0] if all(name in each for each in sets)] if sets else []
    stacked = {name: torch.stack([each[name].float() for each in sets]) for name in common}
    return {name: each.max() if name.endswith("_max") else each.mean() for name, each in stacked.items()}

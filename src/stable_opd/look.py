"""A first look at the student's tokens, before the loss: what weights may depend on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.diagnostics import entropy
from stable_opd.divergences.kl import expectation
from stable_opd.models import output_head
from stable_opd.objective import Piece, Reading, part_of
from stable_opd.scoring import HiddenStates, body
from stable_opd.streaming import scores, tiles
from stable_opd.types import Repetition, Rollout


@dataclass(frozen=True)
class Glance:
    """What the models say of each completion token; 0 where the student did not write, (N,) each.

    Attributes:
        student: Log-prob under the student.
        teacher: Log-prob under the teacher.
        entropy: Entropy of the student's distribution, in nats.
        divergence: KL(student || teacher) at the position, in nats.
    """

    student: Tensor
    teacher: Tensor
    entropy: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Look:
    """What a `Weighting` sees: the whole batch of this process, before the loss.

    Attributes:
        rollout: The rows.
        repetition: What the detector said of them.
        progress: Share of the training that is over, from 0 to 1.
        own: The tokens that the student wrote, (N,) bool; weights of the others do not matter.
        gather: Puts the values of all processes one after the other, (n,) -> (m,).
        glance: What the models say, for weightings that declare ``needs_scores``.
    """

    rollout: Rollout
    repetition: Repetition
    progress: float
    own: Tensor
    gather: Callable[[Tensor], Tensor]
    glance: Glance | None = None

    @cached_property
    def scores(self) -> Glance:
        """What the models say.

        Raises:
            ValueError: If they were not asked.
        """
        if self.glance is None:
            raise ValueError("The models were not asked. Declare needs_scores = True in the weighting's class.")
        return self.glance


@torch.no_grad()
def glance(
    work: Iterable[Piece],
    readings: Iterable[Sequence[Reading]],
    student: PreTrainedModel,
    vocabulary: int,
    count: int,
) -> Glance:
    """Let the student read all micro-batches without a gradient, and compare it with the teacher.

    Args:
        work: The micro-batches.
        readings: What the teacher said of each.
        student: The model that learns.
        vocabulary: Size of the shared vocabulary.
        count: Completion tokens N of the rollout.
    """
    found = torch.zeros(4, count, device=student.device)
    head = output_head(student, vocabulary).detached()
    for piece, answers in zip(work, readings, strict=True):
        states, start = body(student, piece.rollout), 0
        for group, reading in zip(piece.groups, answers, strict=True):
            ours = HiddenStates(states[start : start + len(group.places)], head)
            start += len(group.places)
            if not group.on_policy or reading.teacher is None:
                continue
            part = part_of(group, reading, {})
            for tile in tiles(part, ours):
                tokens = group.evidence.tokens[tile]
                p = scores("student", ours, tile, tokens)[0]
                q = scores("teacher", reading.teacher, tile, tokens)[0]
                divergence = expectation(p.probs, p.logprobs - q.logprobs)
                found[:, group.places[tile]] = torch.stack([p.sampled, q.sampled, entropy(p.logprobs), divergence])
    return Glance(*found)

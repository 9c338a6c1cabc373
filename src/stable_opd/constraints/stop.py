"""Staying near the initial student in when to stop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stable_opd.constraints.base import WeightedConstraint
from stable_opd.controllers import Controller
from stable_opd.divergences.kl import reverse_kl
from stable_opd.schedules import Schedule
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, TokenLoss


def stop_logprobs(logprobs: Tensor, stop: Sequence[int], room: Tensor | None = None) -> Tensor:
    """Return the log-probs of stopping and of going on.

    Each is a sum of its own, so neither is lost to rounding where the other is near 1.

    Args:
        logprobs: Log-probs of the whole vocabulary, (n, V).
        stop: Token ids that end an answer; their order and repetitions do not matter.
        room: Memory for a copy of the log-probs, (n, V); none takes new.

    Returns:
        Log-probs, (n, 2).

    Raises:
        ValueError: If no token ends an answer.
    """
    tokens = _tensor(stop, logprobs.device)
    others = logprobs.clone() if room is None else room.copy_(logprobs)
    others = others.index_fill_(1, tokens, -torch.inf)
    return torch.stack([logprobs[:, tokens].logsumexp(-1), others.logsumexp(-1)], -1)


def _tensor(stop: Sequence[int], device: torch.device) -> Tensor:
    if not stop:
        raise ValueError(
            "Expected the token ids that end an answer, but got none. Give the evidence the stop ids of the student, "
            "or set eos_token in its tokenizer."
        )
    return torch.tensor(sorted(set(stop)), device=device)


class StopReferenceKL(WeightedConstraint):
    """KL from the initial student to the student in whether to stop, at every visited state.

        weight * (s_0 log(s_0 / s) + (1 - s_0) log((1 - s_0) / (1 - s))),  s = sum of p_v over the stop tokens

    It holds the answers' ends where the reference would end them and leaves everything else free: what is likely given
    that the answer stops, or goes on, has no part in it. As in `ReferenceForwardKL`, of which it is a lower bound, it
    costs without bound to rule out stopping. Prefer that one where more than the length drifts.

    Source: of this project; the KL of the event that Luo et al. 2026 (arXiv 2604.08527) see vanish in long answers. No
    weight is published; stopping is one event in an answer, so the mean over its tokens is small.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        controller: Changes the weight so that the KL comes to a target; none leaves it alone.
    """

    support: Support = "full"
    needs_reference: bool = True

    def __init__(
        self, weight: float = 0.1, schedule: Schedule | None = None, controller: Controller | None = None
    ) -> None:
        super().__init__(weight, schedule, controller)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted divergence of each position."""
        ours = stop_logprobs(evidence.student.logprobs, evidence.stop)
        divergence = reverse_kl(stop_logprobs(evidence.reference.logprobs, evidence.stop), ours)
        weight = self.scale(evidence)
        return TokenLoss(weight * divergence, divergence.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the weighted divergence and write its gradient in the logits.

        For a token v of either event e (to stop, to go on) it is weight * p(v | e) * (p(e) - p_0(e)).
        """
        student, stop, weight = evidence.student, evidence.stop, self.scale(evidence)
        theirs = stop_logprobs(evidence.reference.logprobs, stop, out)
        ours = stop_logprobs(student.logprobs, stop, out)
        divergence = reverse_kl(theirs, ours)
        slope = weight * (ours.exp() - theirs.exp())
        torch.sub(student.logprobs, ours[:, 1:], out=out).exp_().mul_(slope[:, 1:])
        tokens = _tensor(stop, out.device)
        out[:, tokens] = (student.logprobs[:, tokens] - ours[:, :1]).exp() * slope[:, :1]
        return TokenLoss(weight * divergence, divergence, evidence.written_by(Author.STUDENT))

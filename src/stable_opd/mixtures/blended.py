"""Rows in which the teacher has a say in every token."""

import math

import torch
from torch import Tensor

from stable_opd.mixtures.base import Mixture, nothing
from stable_opd.mixtures.student import student_rows
from stable_opd.schedules import Schedule, scheduled
from stable_opd.types import Evidence, Plan, Prompts, TokenLoss


def mixed(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """Return the log-probs of (1 - share) p + share q.

    Args:
        student: Logits of p, (..., V); -inf rules a token out.
        teacher: Logits of q, (..., V).
        share: Share of the teacher, from 0 to 1.
    """
    p, q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    if share == 0 or share == 1:
        return q if share else p
    return torch.logaddexp(p + math.log1p(-share), q + math.log(share))


def speculative(student: Tensor, teacher: Tensor, k: int) -> Tensor:
    """Return the log-probs of a token that the student proposes, and the teacher replaces if it is not in its top k.

        mu(v) = p(v) 1[v in top-k of q] + (1 - sum of p over the top-k of q) q(v)

    Args:
        student: Logits of p, (..., V); -inf rules a token out.
        teacher: Logits of q, (..., V).
        k: How many of the teacher's likeliest tokens are accepted.
    """
    p, q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    top = q.topk(min(k, q.shape[-1]), -1).indices
    accepted = torch.full_like(p, -math.inf).scatter(-1, top, p.gather(-1, top))
    refused = p.scatter(-1, top, -math.inf).logsumexp(-1, keepdim=True)
    return torch.logaddexp(accepted, refused + q)


class _Blended(Mixture):
    """The student's rows alone, drawn from a distribution in which the teacher has a say."""

    positionwise: bool = True
    blends: bool = True

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows and nothing else."""
        return student_rows(prompts, samples)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return zeros: all rows count as the student's."""
        return nothing(evidence)


class TeacherMixing(_Blended):
    """Every token is drawn from a mixture of student and teacher.

        y_t ~ mu = (1 - share) p + share q

    It keeps early rollouts from degenerating. The tokens count as the student's, drawn from mu: sampled divergences
    correct by the ratio p / mu, which is at most 1 / (1 - share), and the others learn from the states that mu visits.
    The clip of `SampledReverseKL` does not bias that: the ratio is below 1 exactly where the advantage log(q / p) is
    positive, and above 1 where it is negative, and on those sides nothing is cut. That ends with a discount, a baseline
    or a sampler that is not the student itself; then set the clip to null. `SpeculativeMixing` leaves alone what the
    teacher finds acceptable.

    Source: teacher-mixed sampling of MiniLLM (Gu et al. 2024, arXiv 2306.08543), with a share of 0.2. The correction is
    by token here, and there by the product of the ratios so far.

    Args:
        share: Share of the teacher, from 0 to below 1.
        annealing: Factor of the share in the course of the training; none keeps it constant.
    """

    def __init__(self, share: float = 0.2, annealing: Schedule | None = None) -> None:
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(
                f"Expected a share of at least 0 and below 1, but got {share}. Rows of the teacher's alone are what "
                "TeacherMixture adds."
            )
        self.share = share
        self.annealing = annealing

    def blend(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """Return the log-probs of the mixture, (B, V)."""
        return mixed(student, teacher, min(max(scheduled(self.share, self.annealing, progress), 0.0), 1.0))


class SpeculativeMixing(_Blended):
    """The student proposes each token, and the teacher replaces those that are not among its likeliest.

        y ~ p is kept if the teacher's top k has it, else y ~ q;
        so y_t ~ mu(v) = p(v) 1[v in top-k of q] + (1 - sum of p over the top-k of q) q(v)

    The tokens count as the student's, drawn from mu, and sampled divergences correct by the ratio p / mu. Outside the
    top k that has no bound, and the clip of `SampledReverseKL` biases it on both sides: a clip of null is without bias
    and of high variance. Divergences over the vocabulary, such as `ReverseKL`, have neither problem. The student visits
    what it would itself write as long as that is acceptable, which `TeacherMixing` does not see to.

    Source: speculative knowledge distillation (Xu et al. 2024, arXiv 2410.11325), with k = 25.

    Args:
        k: How many of the teacher's likeliest tokens are accepted.
    """

    def __init__(self, k: int = 25) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(
                f"Expected k of at least 1, but got {k}. Rows of the teacher's alone are what TeacherMixture adds."
            )
        self.k = k

    def blend(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """Return the log-probs of what is drawn in the end, (B, V)."""
        return speculative(student, teacher, self.k)

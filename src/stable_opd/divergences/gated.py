"""Divergences that follow the sampled token where that can be trusted, and a local divergence elsewhere."""

from abc import abstractmethod

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence, Divergence
from stable_opd.divergences.sampled import SampledReverseKL
from stable_opd.divergences.top_k import TeacherTopKForwardKL
from stable_opd.terms import Support
from stable_opd.types import Evidence, TokenLoss


class GatedDivergence(Divergence):
    """A gate per token between the policy gradient of the drawn token and a divergence over several tokens.

        gate_t * sampled_t + (1 - gate_t) * local_t

    What has to be seen follows from the parts.

    Args:
        local: What counts where the gate is shut; none means `TeacherTopKForwardKL` with 64 tokens.
        sampled: What counts where it is open; none means `SampledReverseKL`.
    """

    support: Support = "topk"

    def __init__(self, local: Divergence | None = None, sampled: AdvantageDivergence | None = None) -> None:
        super().__init__()
        self.local = TeacherTopKForwardKL(k=64) if local is None else local
        self.sampled = SampledReverseKL() if sampled is None else sampled
        parts = self.local, self.sampled
        for part in parts:
            if part.support == "sampled" and not part.positionwise:
                raise ValueError(
                    f"Expected parts that look at each position by itself, but got a {type(part).__name__} that "
                    "follows rows. Set its discount to 0, if it has one, or use it without a gate."
                )
        supports = {part.support for part in parts}
        self.support = next(each for each in ("full", "topk", "sampled") if each in supports)
        self.positionwise = True
        self.needs_reference = any(part.needs_reference for part in parts)

    @abstractmethod
    def gate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return how much of the policy gradient each written token gets, from 0 to 1, (n,).

        Args:
            student: Log-probs of the written tokens under the student, (n,), without gradient.
            teacher: Those under the teacher, (n,).
        """

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the mixture of both losses; the value is the mixture of both values."""
        gate = self.gate(evidence.student.sampled.detach(), evidence.teacher.sampled)
        sampled, local = self.sampled(evidence), self.local(evidence)
        return TokenLoss(
            gate * _spoken(sampled, sampled.loss) + (1 - gate) * _spoken(local, local.loss),
            gate * _spoken(sampled, sampled.value) + (1 - gate) * _spoken(local, local.value),
            sampled.where | local.where,
        )


class TrustGated(GatedDivergence):
    """Policy gradient as far as the teacher trusts the token, and a local divergence for the rest.

        trust_t * sampled_t + (1 - trust_t) * local_t,  trust_t = sg[min(q(y_t) / p(y_t), 1)]

    A token that the teacher finds as likely as the student is trusted; one that it hardly knows would come with a huge
    negative advantage and is replaced by what the teacher would have said. The source draws for each token which of the
    two it gets, with the trust as the probability; this is the mean over those draws. Averaged over the student's
    tokens the local part weighs as much as the total variation distance. Prefer `AsymmetricDivergence` for a gate that
    is open or shut.

    Source: TrOPD (arXiv 2606.01249).

    Args:
        local: What counts where there is no trust; none means `TeacherTopKForwardKL` with 64 tokens, as in the source.
        sampled: What counts where there is; none means `SampledReverseKL`.
    """

    def gate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return min(q / p, 1)."""
        return (teacher - student).clamp(max=0).exp()


class AsymmetricDivergence(GatedDivergence):
    """Policy gradient for tokens that the teacher likes better than the student, a local divergence for all others.

        sampled_t where q(y_t) > p(y_t),  local_t elsewhere

    A negative advantage says what not to write and nothing of what to write instead; a local divergence says it. So
    entropy stays higher than with `SampledReverseKL`. Prefer `TrustGated` for a gate without a jump.

    Source: AOPD (arXiv 2605.06387), which does not publish the number of tokens.

    Args:
        local: What counts where the advantage is not positive; none means `TeacherTopKForwardKL` with 64 tokens.
        sampled: What counts where it is; none means `SampledReverseKL`.
    """

    def gate(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return 1 where log q - log p is positive and 0 elsewhere."""
        return (teacher > student).to(student.dtype)


def _spoken(term: TokenLoss, figure: Tensor) -> Tensor:
    return figure.masked_fill(~term.where, 0)

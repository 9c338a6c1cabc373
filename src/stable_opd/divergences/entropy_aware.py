"""Reverse KL, with forward KL where the teacher is uncertain."""

from torch import Tensor

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.kl import expectation, reverse_kl, reverse_kl_and_gradient
from stable_opd.divergences.top_k import checked_k, restricted
from stable_opd.terms import Support
from stable_opd.types import Author, Evidence, Scores, TokenLoss


def uncertain(model: Scores, threshold: float) -> Tensor:
    """Return where the entropy of a model's distribution exceeds a threshold in nats, (n,) bool."""
    return -expectation(model.probs, model.logprobs) > threshold


class EntropyAware(Divergence):
    """Reverse KL to the teacher, plus forward KL on its likeliest tokens where its entropy is high.

        KL(p || q) + 1[H(q) > threshold] * forward_weight * KL(q' || p')

    with q' and p' renormalised on the teacher's K likeliest tokens. Where the teacher hesitates, the reverse KL alone
    lets the student settle on one of its choices; the forward KL asks for all of them. A threshold of log V or more
    leaves `ReverseKL`, and `SymmetricKL` does not ask how certain the teacher is.

    Source: Jin et al. 2026 (EOPD, arXiv 2603.07079), where the reverse part is clipped and sampled; here it is exact.

    Args:
        threshold: Entropy of the teacher above which the forward KL is added, in nats.
        forward_weight: Factor of the forward KL.
        k: How many of the teacher's likeliest tokens the forward KL looks at.
    """

    support: Support = "full"

    def __init__(self, threshold: float = 0.8, forward_weight: float = 1.0, k: int = 32) -> None:
        super().__init__()
        if not threshold >= 0:
            raise ValueError(
                f"Expected threshold of at least 0, but got {threshold}. Use 0 to add the forward KL wherever the "
                "teacher is not certain."
            )
        if not forward_weight >= 0:
            raise ValueError(
                f"Expected forward_weight of at least 0, but got {forward_weight}. Use ReverseKL to go without the "
                "forward KL."
            )
        self.threshold = threshold
        self.forward_weight = forward_weight
        self.k = checked_k(k)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the divergence of each position."""
        student, teacher = evidence.student.logprobs, evidence.teacher.logprobs
        tokens, top = evidence.teacher.top(self.k)
        covered = reverse_kl(top.log_softmax(-1), restricted(student, tokens))
        loss = reverse_kl(student, teacher) + self._weight(evidence) * covered
        return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    def closed_form(self, evidence: Evidence, out: Tensor) -> TokenLoss:
        """Return the divergence and write its gradient: that of the reverse KL, and weight (p'_v - q'_v) on S."""
        loss = reverse_kl_and_gradient(evidence.student, evidence.teacher, out)
        tokens, top = evidence.teacher.top(self.k)
        student, teacher = restricted(evidence.student.logprobs, tokens), top.log_softmax(-1)
        q, weight = teacher.exp(), self._weight(evidence)
        out.scatter_add_(-1, tokens, weight[:, None] * (student.exp() - q))
        loss = loss + weight * (q * (teacher - student)).sum(-1)
        return TokenLoss(loss, loss, evidence.written_by(Author.STUDENT))

    def _weight(self, evidence: Evidence) -> Tensor:
        high = uncertain(evidence.teacher, self.threshold)
        return self.forward_weight * high.to(evidence.teacher.logprobs.dtype)

"""The contract of a divergence: what pulls the student to the teacher.

A complete plug-in:

    from stable_opd import Author, Divergence, Evidence, TokenLoss

    class ForwardKL(Divergence):
        \"\"\"Forward KL over the whole vocabulary.\"\"\"

        support = "full"

        def forward(self, evidence: Evidence) -> TokenLoss:
            p, q = evidence.student.logprobs, evidence.teacher.logprobs
            loss = (q.exp() * (q - p)).sum(-1)
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

And one that is given by the advantage of a token, from its log-probs under the models:

    from stable_opd import AdvantageDivergence

    class SampledReverseKL(AdvantageDivergence):
        \"\"\"Reverse KL from the written tokens.\"\"\"

        def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
            return teacher - student
"""

from abc import abstractmethod
from collections.abc import Callable
from operator import attrgetter
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform
from stable_opd.terms import LossTerm
from stable_opd.types import Author, Evidence, Scores, TokenLoss

#: A token that a model rules out counts as if it had this log-prob, so that advantages and their means stay finite.
LEAST_LOGPROB = -1e4

#: The largest logarithm of an importance ratio; beyond it the ratio stands still.
LARGEST_LOG_RATIO = 20.0


class Divergence(LossTerm):
    """What pulls the student to the teacher; it is called on the rows that the student wrote."""

    kind: ClassVar[str] = "divergence"
    needs_teacher: bool = True
    weighted: bool = True


def clipped_surrogate(
    log_ratio: Tensor, advantage: Tensor, clip: float | None, dual_clip: float | None = None
) -> Tensor:
    """Return the clipped policy-gradient loss of PPO and GRPO, per position.

        -min(rho * A, clamp(rho, 1 - clip, 1 + clip) * A),  rho = exp(log_ratio)

    and at most -dual_clip * A where A < 0, however large the ratio is.

    Args:
        log_ratio: Log-prob of the token under the student minus that under whoever drew it, (n,).
        advantage: Advantage A of the token, (n,), without gradient.
        clip: Half-width of the interval in which the ratio may move; None weighs by the ratio alone, -rho * A.
        dual_clip: How much the ratio of a token of negative advantage may count; None means without bound.

    Returns:
        Losses, (n,).
    """
    ratio = log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()
    gain = ratio * advantage
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if dual_clip is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual_clip * advantage), gain)
    return -gain


def discounted_future(rewards: Tensor, row: Tensor, discount: float) -> Tensor:
    """Return what follows each token in its row, sum_{k > t} discount^(k - t) r_k.

    Args:
        rewards: What each token counts, (n,).
        row: Row of each token, (n,); rows are contiguous.
        discount: Factor per token, from 0 to 1.

    Returns:
        Sums, (n,); 0 at the last token of a row.
    """
    total, step = rewards, 1
    # Each round doubles how many tokens of its row an entry of `total` adds up.
    while step < len(rewards):
        same = row[step:] == row[:-step]
        total = torch.cat([total[:-step] + discount**step * total[step:] * same, total[-step:]])
        step *= 2
    future = torch.zeros_like(total)
    future[:-1] = discount * total[1:] * (row[1:] == row[:-1])
    return future


class LogProbs(NamedTuple):
    """Log-probs of some tokens under the three models, all of one shape and at least `LEAST_LOGPROB`."""

    student: Tensor
    teacher: Tensor
    reference: Tensor | None


class AdvantageDivergence(Divergence):
    """A divergence that is given as an advantage per token and descended by the clipped policy gradient.

        loss_t = -min(rho_t G_t, clamp(rho_t, 1 - clip, 1 + clip) G_t)
        G_t = transform(A_t) - baseline_t + sum_{k > t} discount^(k - t) transform(-D_k)

    with A the `advantage` and D the `estimate` of the divergence. For most of them D is -A, and G_t is the discounted
    sum of the advantages from t on. The parts decide what has to be seen: a baseline the whole vocabulary, a discount
    whole rows. Tokens that the student did not write add nothing to a sum.

    With a discount of 1 and no transform, the sum of the losses over an answer has the gradient of the expected sum of
    D; a mean over the tokens of each answer (`sequence_mean`) divides it by the length.

    Args:
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for. 0 takes the
            visited states as given; 1 counts the whole answer, at a variance that grows fast with its length.
    """

    positionwise: bool = True

    def __init__(
        self,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"Expected a clip above 0, but got {clip}. Use null for none.")
        if dual_clip is not None and not dual_clip > 1:
            raise ValueError(
                f"Expected a dual_clip above 1, but got {dual_clip}. It bounds ratios that have grown; use null for "
                "none."
            )
        if not 0 <= discount <= 1:
            raise ValueError(f"Expected a discount from 0 to 1, but got {discount}. 0 counts each token by itself.")
        if discount > 0 and baseline is not None:
            raise ValueError(
                f"Expected either a discount or a baseline, but got a discount of {discount} and a "
                f"{type(baseline).__name__}. What follows a token is known of whole rows only, and a baseline sees the "
                "vocabulary of a few positions at a time. Set the discount to 0, or leave the baseline out."
            )
        self.clip = clip
        self.dual_clip = dual_clip
        self.transform = transform
        self.baseline = baseline
        self.discount = discount
        self.support = "sampled" if baseline is None else "full"
        self.positionwise = discount == 0

    @abstractmethod
    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return the advantage of tokens from their log-probs, entry by entry.

        Args:
            student: Log-probs under the student, (n,) of the written tokens or (n, K) of several at each position.
            teacher: Those under the teacher, of the same shape.
            reference: Those under the initial student; None unless ``needs_reference``.

        Returns:
            Advantages of the same shape; their gradient is not used.
        """

    def estimate(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return what has the divergence as its mean over the student's tokens, entry by entry; here -A.

        It is what is reported, and what a discount adds up. The arguments are those of `advantage`.
        """
        return -self.advantage(student, teacher, reference)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the clipped surrogate; the value is the estimate of the divergence."""
        own = evidence.written_by(Author.STUDENT)
        with torch.no_grad():
            written = self._read(evidence, attrgetter("sampled"))
            value = self.estimate(*written)
            gain = self._worth(*written)
            if self.baseline is not None:
                gain = gain - self.baseline(self._worth, *self._read(evidence, attrgetter("logprobs")))
            if self.discount > 0:
                rewards = self._transformed(-value).where(own, 0)
                gain = gain + discounted_future(rewards, evidence.row, self.discount)
        log_ratio = evidence.student.sampled - evidence.behaviour_logprobs
        return TokenLoss(clipped_surrogate(log_ratio, gain, self.clip, self.dual_clip), value, own)

    def _worth(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        return self._transformed(self.advantage(student, teacher, reference))

    def _transformed(self, advantage: Tensor) -> Tensor:
        return advantage if self.transform is None else self.transform(advantage)

    def _read(self, evidence: Evidence, read: Callable[[Scores], Tensor]) -> LogProbs:
        student, teacher = (read(each).clamp(min=LEAST_LOGPROB) for each in (evidence.student, evidence.teacher))
        reference = read(evidence.reference).clamp(min=LEAST_LOGPROB) if self.needs_reference else None
        return LogProbs(student, teacher, reference)

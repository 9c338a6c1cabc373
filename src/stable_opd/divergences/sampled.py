"""Reverse KL estimated from the sampled tokens."""

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence, Divergence
from stable_opd.divergences.estimators import Estimator, EstimatorName, estimator
from stable_opd.types import Author, Evidence, TokenLoss


class SampledReverseKL(AdvantageDivergence):
    """Sampled-token reverse KL as a token advantage in the clipped surrogate: the objective of the Stable-OPD paper.

        A_t = log q(y_t) - log p(y_t),  loss_t = -min(rho_t A_t, clamp(rho_t, 1 - clip, 1 + clip) A_t)

    with rho_t the ratio of the student to whoever drew the token. At rho = 1 its expected gradient is that of
    `ReverseKL` at the visited states, and with a discount of 1 that of the reverse KL of whole answers. By default no
    return-to-go, no baseline, no normalisation of the advantages.

    Source: Luo et al. 2026 (arXiv 2604.08527, eqs 3 to 6). Prefer `ReverseKL` where the teacher is at hand: the same
    gradient without the variance of the sampled token.

    Args:
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return log q - log p."""
        return teacher - student


class EstimatedReverseKL(Divergence):
    """Sampled-token reverse KL as a loss that is differentiated as it stands, without a clip.

        k2: rho 1/2 (log r)^2    k4: -rho sg(log r)    k3pp: rho (r - 1 - log r),    r = q(y_t) / p(y_t)

    All have the expected gradient of `ReverseKL` at the visited states, and k4 and k3pp that of `SampledReverseKL`
    token by token; they differ in the value that is reported, half the squared log-ratio, the log-ratio itself, or one
    that is unbiased and never negative. Prefer `SampledReverseKL` where several steps are made on a rollout.

    Source: Tang & Munos 2025 (arXiv 2506.09477); k2 as a loss in KDRL (arXiv 2506.02208), k4 and k3++ in EMA-PG.

    Args:
        estimator: Which loss. Those of another divergence or of none are refused with the reason.
    """

    positionwise: bool = True

    def __init__(self, estimator: EstimatorName = "k2") -> None:
        super().__init__()
        self.estimator = estimator
        self._loss = _of_reverse_kl(estimator)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the loss; the value is the estimate that goes with it."""
        loss, value = self._loss(evidence.student.sampled, evidence.teacher.sampled, evidence.behaviour_logprobs)
        return TokenLoss(loss, value, evidence.written_by(Author.STUDENT))


def _of_reverse_kl(name: str) -> Estimator:
    if name == "k5":
        raise ValueError(
            "Expected an estimator of the reverse KL, but got 'k5', which descends the forward KL. Use "
            "SampledForwardKL, whose gradient is the same."
        )
    return estimator(name)

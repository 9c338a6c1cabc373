"""f-divergences estimated from the sampled tokens, with the advantages that descend them.

The mean over the student's tokens of f(u), u = q / p, is a divergence if f is convex and f(1) = 0. Its gradient is not
that of the advantage -f(u), because u depends on the student too; it is that of

    A = u f'(u) - f(u)

to which any constant may be added, since sum_v p_v grad log p_v = 0. It is chosen such that A = 0 where u = 1: a
student that agrees with its teacher then gets no gradient from any token, instead of some that cancel in the mean.
"""

from abc import abstractmethod

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.proximal import log_mixture
from stable_opd.divergences.transforms import AdvantageTransform


class SampledFDivergence(AdvantageDivergence):
    """An f-divergence that is given by f and by its advantage, both as functions of log u = log q - log p.

    Args:
        limit: The largest log u in size; what is beyond counts as that much. It bounds the advantages, at the price of
            a bias where teacher and student are further apart than e^limit.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def __init__(
        self,
        limit: float = 6.0,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__(clip, dual_clip, transform, baseline, discount)
        if not limit > 0:
            raise ValueError(f"Expected a limit above 0, but got {limit}. A large one, such as 80, is as good as none.")
        self.limit = limit

    @abstractmethod
    def advantage_at(self, log_u: Tensor) -> Tensor:
        """Return u f'(u) - f(u), up to a constant that makes it 0 at u = 1."""

    @abstractmethod
    def f_at(self, log_u: Tensor) -> Tensor:
        """Return f(u), up to a multiple of u - 1, whose mean is 0, that makes it nowhere negative."""

    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return the advantage at the clamped log-ratio."""
        return self.advantage_at((teacher - student).clamp(-self.limit, self.limit))

    def estimate(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return f at the clamped log-ratio, whose mean is the divergence."""
        return self.f_at((teacher - student).clamp(-self.limit, self.limit))


class SampledForwardKL(SampledFDivergence):
    """Sampled-token forward KL, by the advantage that descends it.

        f(u) = u log u,  A = u - 1,  u = q(y_t) / p(y_t)

    Mass-covering, but only among what the student draws: a token that the teacher likes and the student never writes is
    never seen, and one that it hardly ever writes comes with an advantage of up to e^limit = 403. Prefer `ForwardKL`
    where the teacher is at hand, and `SampledJensenShannon` for milder advantages. The advantage -u log u, which some
    code takes instead, does not descend it and collapses within a few steps.

    Source: OPD+ (arXiv 2606.01039).

    Args:
        limit: The largest log u in size; what is beyond counts as that much.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def advantage_at(self, log_u: Tensor) -> Tensor:
        """Return u - 1."""
        return log_u.expm1()

    def f_at(self, log_u: Tensor) -> Tensor:
        """Return u log u - u + 1."""
        return log_u.exp() * log_u - log_u.expm1()


class SampledJensenShannon(SampledFDivergence):
    """Sampled-token Jensen-Shannon divergence, by the advantage that descends it.

        f(u) = 1/2 u log(2 u / (1 + u)) + 1/2 log(2 / (1 + u)),  A = 1/2 log((1 + u) / 2),  u = q(y_t) / p(y_t)

    No token is punished by more than 1/2 log 2 = 0.35, while the reward of one that the teacher likes better grows
    with log u. Prefer `SampledReverseKL` where tokens that the teacher rules out have to go, and `JensenShannon` where
    the teacher is at hand.

    Source: OPD+ (arXiv 2606.01039).

    Args:
        limit: The largest log u in size; what is beyond counts as that much.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def advantage_at(self, log_u: Tensor) -> Tensor:
        """Return 1/2 log((1 + u) / 2)."""
        return log_mixture(log_u, 0.5) / 2

    def f_at(self, log_u: Tensor) -> Tensor:
        """Return f, whose slope at u = 1 is 0 as it is."""
        middle = log_mixture(log_u, 0.5)
        return (log_u.exp() * (log_u - middle) - middle) / 2


class SampledTotalVariation(SampledFDivergence):
    """Sampled-token total variation distance, by the advantage that descends it.

        f(u) = 1/2 |u - 1|,  A = 1/2 sign(u - 1),  u = q(y_t) / p(y_t)

    Only which of the two models likes a token better counts. All tokens weigh the same, so there are no outliers, and
    the gradient does not shrink as the student comes close. Prefer `SampledReverseKL` for a smooth approach, and
    `TotalVariation` where the teacher is at hand.

    Source: OPD+ (arXiv 2606.01039) for the rule; TV-OPD (arXiv 2609.08341) for training by the sign.

    Args:
        limit: The largest log u in size; here it bounds the reported value alone.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def advantage_at(self, log_u: Tensor) -> Tensor:
        """Return 1/2 sign(u - 1)."""
        return log_u.sign() / 2

    def f_at(self, log_u: Tensor) -> Tensor:
        """Return 1/2 |u - 1|."""
        return log_u.expm1().abs() / 2


class SampledAlpha(SampledFDivergence):
    """Sampled-token alpha divergence, between the reverse and the forward KL, by the advantage that descends it.

        f(u) = (1 - u^alpha) / (alpha (1 - alpha)),  A = (u^alpha - 1) / alpha,  u = q(y_t) / p(y_t)

    As alpha goes to 0 it becomes `SampledReverseKL`, as it goes to 1 `SampledForwardKL`. No token is punished by more
    than 1 / alpha, and the larger alpha, the larger the rewards of unlikely ones. Prefer `AlphaDivergence` where the
    teacher is at hand: the same gradient without the variance of the sampled token.

    Source: derived from OPD+ (arXiv 2606.01039) for the alpha divergences of Amari.

    Args:
        alpha: Where between the reverse KL at 0 and the forward KL at 1, both excluded.
        limit: The largest log u in size; what is beyond counts as that much.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        limit: float = 6.0,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__(limit, clip, dual_clip, transform, baseline, discount)
        if not 0 < alpha < 1:
            raise ValueError(
                f"Expected alpha above 0 and below 1, but got {alpha}. Use SampledReverseKL for 0 and "
                "SampledForwardKL for 1."
            )
        self.alpha = alpha

    def advantage_at(self, log_u: Tensor) -> Tensor:
        """Return (u^alpha - 1) / alpha."""
        return (self.alpha * log_u).expm1() / self.alpha

    def f_at(self, log_u: Tensor) -> Tensor:
        """Return (1 - u^alpha + alpha (u - 1)) / (alpha (1 - alpha))."""
        return (log_u.expm1() - self.advantage_at(log_u)) / (1 - self.alpha)

"""Only tokens that the student would write as likely as whoever drew them count."""

from torch import Tensor

from stable_opd.look import Look
from stable_opd.weightings.base import Weighting


def near_policy(student: Tensor, behaviour: Tensor, limit: float) -> Tensor:
    """Return where 1/2 (log rho)^2 is within a limit, (N,) bool.

    Args:
        student: Log-prob of each token under the student, (N,).
        behaviour: Log-prob under whoever drew it, (N,).
        limit: The limit, in nats.
    """
    return (student - behaviour).square() / 2 <= limit


class RatioMask(Weighting):
    """A trust region as a mask: only tokens that the student draws about as often as whoever drew them count.

        w_t = 1[(log rho_t)^2 / 2 <= limit],  rho_t = p(y_t) / behaviour(y_t)

    The left side is the KL of the two policies at the token, to second order. In this library rows are written by the
    student as it is, so rho is 1 up to rounding, unless a sampler, another engine or a mixture makes the behaviour
    another: a temperature far from 1 puts many tokens outside of the region. The clip of the sampled divergences
    bounds the ratio on the side on which it would grow, and keeps the value of a token; the mask leaves the token out
    on both sides, also of divergences over the whole vocabulary.

    Source: TorchRL, `GRPOLoss` with ``kl_mask_threshold``.

    Args:
        limit: The largest (log rho)^2 / 2 that counts; 0.02 lets rho be between 0.82 and 1.22.
    """

    needs_scores: bool = True

    def __init__(self, limit: float = 0.02) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(
                f"Expected limit above 0, but got {limit}: rounding alone would leave tokens out. A ratio of r has "
                "(log r)^2 / 2."
            )
        self.limit = limit

    def forward(self, look: Look) -> Tensor:
        """Return 1 for tokens within the region."""
        return near_policy(look.scores.student, look.rollout.behaviour_logprobs, self.limit).float()

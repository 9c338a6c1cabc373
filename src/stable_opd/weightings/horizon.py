"""Only the first part of each answer counts."""

from torch import Tensor

from stable_opd.look import Look
from stable_opd.schedules import Schedule, scheduled
from stable_opd.weightings.base import Weighting
from stable_opd.weightings.sums import sums_before


def prefix_mask(own: Tensor, row: Tensor, horizon: float) -> Tensor:
    """Return which tokens are within the horizon.

    Args:
        own: Which tokens the student wrote, (N,) bool.
        row: Row of each token, in ascending order, (N,).
        horizon: How many of the student's tokens count in each row; part of a token counts as one.

    Returns:
        1 for tokens that fewer than ``horizon`` of the student's stand before in their row, 0 for the others, (N,).
    """
    return (sums_before(own, row) < horizon).float()


class PrefixHorizon(Weighting):
    """Only the first tokens of each answer count, as many as a horizon that may grow.

        w_t = 1[t < max(1, horizon * schedule(progress))],  t = 0 at the first token that the student wrote

    The later a token, the more it stands on what the student wrote before, and the less a teacher has to say about it.
    The horizon is in tokens and not a share of the row: whether a token counts must not depend on how its row went on,
    a row that repeats itself up to the budget would have the longest prefix of all, and short answers keep the tokens
    that end them. For a share of the longest answer, multiply it by ``model.rollout.max_new_tokens``. Answers are still
    written to their end; `PositionWeight` fades instead of cutting.

    Source: Fast-OPD (arXiv 2602.15260); TOPD, with a fixed horizon of a tenth, and POPD, with one that grows (arXiv
    2605.31490); the first 100 tokens are those of ESR (arXiv 2605.27028).

    Args:
        horizon: In tokens of the student's.
        schedule: Changes it in the course of the training, such as ``Linear(0.1, 1.0)``; none keeps it constant.
    """

    def __init__(self, horizon: int = 100, schedule: Schedule | None = None) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"Expected a horizon of at least 1 token, but got {horizon}: nothing would count.")
        self.horizon = horizon
        self.schedule = schedule

    def forward(self, look: Look) -> Tensor:
        """Return 1 for the tokens within the horizon."""
        # Rounded, so that a factor that is above 0.3 in the last digit only does not let one more token in.
        horizon = max(1.0, round(scheduled(self.horizon, self.schedule, look.progress), 6))
        return prefix_mask(look.own, look.rollout.row, horizon)

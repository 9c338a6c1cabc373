"""How much each token counts."""

from stable_opd.weightings.base import Weighting

__all__ = ["Weighting"]

"""How much each token counts."""

from stable_opd.weightings.agreement import AgreementCut
from stable_opd.weightings.base import Weighting
from stable_opd.weightings.horizon import PrefixHorizon
from stable_opd.weightings.position import PositionWeight
from stable_opd.weightings.ratio import RatioMask
from stable_opd.weightings.selection import TokenSelection
from stable_opd.weightings.special import SpecialTokens

__all__ = [
    "AgreementCut",
    "PositionWeight",
    "PrefixHorizon",
    "RatioMask",
    "SpecialTokens",
    "TokenSelection",
    "Weighting",
]

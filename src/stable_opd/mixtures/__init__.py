"""Whose text the student learns from."""

from stable_opd.mixtures.base import Mixture
from stable_opd.mixtures.golden import GoldenMixture
from stable_opd.mixtures.student import StudentOnly

__all__ = ["GoldenMixture", "Mixture", "StudentOnly"]

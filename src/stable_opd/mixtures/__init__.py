"""Whose text the student learns from."""

from stable_opd.mixtures.base import Mixture, WeightedMixture
from stable_opd.mixtures.blended import SpeculativeMixing, TeacherMixing, mixed, speculative
from stable_opd.mixtures.combined import CombinedMixture
from stable_opd.mixtures.golden import GoldenMixture, ShapedGolden
from stable_opd.mixtures.replay import ReplayMixture
from stable_opd.mixtures.student import StudentOnly
from stable_opd.mixtures.teacher import GKDMixture, PrefixMixture, TeacherMixture

__all__ = [
    "CombinedMixture",
    "GKDMixture",
    "GoldenMixture",
    "Mixture",
    "PrefixMixture",
    "ReplayMixture",
    "ShapedGolden",
    "SpeculativeMixing",
    "StudentOnly",
    "TeacherMixing",
    "TeacherMixture",
    "WeightedMixture",
    "mixed",
    "speculative",
]

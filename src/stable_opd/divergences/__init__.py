"""What pulls the student to the teacher."""

from stable_opd.divergences.base import AdvantageDivergence, Divergence, clipped_surrogate
from stable_opd.divergences.kl import ReverseKL, reverse_kl
from stable_opd.divergences.sampled import SampledReverseKL

__all__ = ["AdvantageDivergence", "Divergence", "ReverseKL", "SampledReverseKL", "clipped_surrogate", "reverse_kl"]

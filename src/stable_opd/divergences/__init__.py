"""What pulls the student to the teacher."""

from stable_opd.divergences.base import AdvantageDivergence, Divergence, clipped_surrogate
from stable_opd.divergences.jensen_shannon import JensenShannon, jensen_shannon
from stable_opd.divergences.kl import ForwardKL, ReverseKL, reverse_kl
from stable_opd.divergences.sampled import SampledReverseKL
from stable_opd.divergences.top_k import TeacherTopK

__all__ = [
    "AdvantageDivergence",
    "Divergence",
    "ForwardKL",
    "JensenShannon",
    "ReverseKL",
    "SampledReverseKL",
    "TeacherTopK",
    "clipped_surrogate",
    "jensen_shannon",
    "reverse_kl",
]

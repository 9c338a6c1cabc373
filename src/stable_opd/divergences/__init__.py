"""What pulls the student to the teacher."""

from stable_opd.divergences.alpha import AlphaDivergence, alpha_divergence
from stable_opd.divergences.base import AdvantageDivergence, Divergence, clipped_surrogate
from stable_opd.divergences.baselines import AdvantageBaseline, ExactBaseline, TopKBaseline
from stable_opd.divergences.entropy_aware import EntropyAware
from stable_opd.divergences.extrapolated import ExtrapolatedTeacher
from stable_opd.divergences.f_divergence import (
    SampledAlpha,
    SampledForwardKL,
    SampledJensenShannon,
    SampledTotalVariation,
)
from stable_opd.divergences.gated import AsymmetricDivergence, TrustGated
from stable_opd.divergences.head_tail import HeadTailKL
from stable_opd.divergences.jensen_shannon import JensenShannon, jensen_shannon
from stable_opd.divergences.kl import ForwardKL, ReverseKL, reverse_kl
from stable_opd.divergences.power import PowerAdvantage
from stable_opd.divergences.proximal import ProximalTeacher
from stable_opd.divergences.sampled import EstimatedReverseKL, SampledReverseKL
from stable_opd.divergences.skew import SkewForwardKL, SkewReverseKL, skew_forward_kl, skew_reverse_kl
from stable_opd.divergences.student_top_k import StudentTopK, student_top_k_kl
from stable_opd.divergences.symmetric import SymmetricKL, symmetric_kl
from stable_opd.divergences.tail_bucket import TailBucketTopK, tail_bucket_kl
from stable_opd.divergences.top_k import TeacherTopK, TeacherTopKForwardKL
from stable_opd.divergences.total_variation import TotalVariation, total_variation
from stable_opd.divergences.transforms import AdvantageTransform, ClipAdvantage, LowerClip, SoftLog, TanhAdvantage

__all__ = [
    "AdvantageBaseline",
    "AdvantageDivergence",
    "AdvantageTransform",
    "AlphaDivergence",
    "AsymmetricDivergence",
    "ClipAdvantage",
    "Divergence",
    "EntropyAware",
    "EstimatedReverseKL",
    "ExactBaseline",
    "ExtrapolatedTeacher",
    "ForwardKL",
    "HeadTailKL",
    "JensenShannon",
    "LowerClip",
    "PowerAdvantage",
    "ProximalTeacher",
    "ReverseKL",
    "SampledAlpha",
    "SampledForwardKL",
    "SampledJensenShannon",
    "SampledReverseKL",
    "SampledTotalVariation",
    "SkewForwardKL",
    "SkewReverseKL",
    "SoftLog",
    "StudentTopK",
    "SymmetricKL",
    "TailBucketTopK",
    "TanhAdvantage",
    "TeacherTopK",
    "TeacherTopKForwardKL",
    "TopKBaseline",
    "TotalVariation",
    "TrustGated",
    "alpha_divergence",
    "clipped_surrogate",
    "jensen_shannon",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "student_top_k_kl",
    "symmetric_kl",
    "tail_bucket_kl",
    "total_variation",
]

"""Which tokens sit inside a loop."""

from stable_opd.repetition.base import RepetitionDetector
from stable_opd.repetition.compression import ZlibRepetition, compression_ratio, is_compressible
from stable_opd.repetition.suffix import PeriodicSuffix, repeated_suffix

__all__ = [
    "PeriodicSuffix",
    "RepetitionDetector",
    "ZlibRepetition",
    "compression_ratio",
    "is_compressible",
    "repeated_suffix",
]

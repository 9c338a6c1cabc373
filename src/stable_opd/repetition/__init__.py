"""Which tokens sit inside a loop."""

from stable_opd.repetition.autocorrelation import TokenAutocorrelation, recurring_tail, smallest_period
from stable_opd.repetition.base import RepetitionDetector, answer_lengths
from stable_opd.repetition.calibration import Calibration, calibrate_zlib, suggest_window
from stable_opd.repetition.composed import AllOf, AnyOf
from stable_opd.repetition.compression import ZlibRepetition, compression_ratio, is_compressible
from stable_opd.repetition.ngram import NGramLoop, NGramShare, rep_n, repeated_ngrams
from stable_opd.repetition.suffix import PeriodicSuffix, repeated_suffix

__all__ = [
    "AllOf",
    "AnyOf",
    "Calibration",
    "NGramLoop",
    "NGramShare",
    "PeriodicSuffix",
    "RepetitionDetector",
    "TokenAutocorrelation",
    "ZlibRepetition",
    "answer_lengths",
    "calibrate_zlib",
    "compression_ratio",
    "is_compressible",
    "recurring_tail",
    "rep_n",
    "repeated_ngrams",
    "repeated_suffix",
    "smallest_period",
    "suggest_window",
]

"""What keeps the student stable."""

from stable_opd.constraints.base import Constraint, RowPenalty, WeightedConstraint
from stable_opd.constraints.entropy import EntropyFloor
from stable_opd.constraints.estimated import EstimatedReferenceKL
from stable_opd.constraints.length import LengthPenalty
from stable_opd.constraints.ratio import RatioPenalty
from stable_opd.constraints.reference import ReferenceForwardKL, ReferenceKL
from stable_opd.constraints.repetition import RepetitionPenalty
from stable_opd.constraints.stop import StopReferenceKL
from stable_opd.constraints.unlikelihood import Unlikelihood
from stable_opd.constraints.weights import InitialWeights

__all__ = [
    "Constraint",
    "EntropyFloor",
    "EstimatedReferenceKL",
    "InitialWeights",
    "LengthPenalty",
    "RatioPenalty",
    "ReferenceForwardKL",
    "ReferenceKL",
    "RepetitionPenalty",
    "RowPenalty",
    "StopReferenceKL",
    "Unlikelihood",
    "WeightedConstraint",
]

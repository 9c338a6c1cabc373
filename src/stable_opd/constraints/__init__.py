"""What keeps the student stable."""

from stable_opd.constraints.base import Constraint
from stable_opd.constraints.reference import ReferenceKL

__all__ = ["Constraint", "ReferenceKL"]

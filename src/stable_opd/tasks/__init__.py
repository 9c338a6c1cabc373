"""What a right answer is."""

from stable_opd.tasks.base import Task
from stable_opd.tasks.chains import ModularChains
from stable_opd.tasks.exact import ExactMatch
from stable_opd.tasks.math import MathVerify

__all__ = ["ExactMatch", "MathVerify", "ModularChains", "Task"]

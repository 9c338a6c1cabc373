"""What a right answer is."""

from stable_opd.tasks.base import Task
from stable_opd.tasks.chains import ModularChains
from stable_opd.tasks.exact import ExactMatch

__all__ = ["ExactMatch", "ModularChains", "Task"]

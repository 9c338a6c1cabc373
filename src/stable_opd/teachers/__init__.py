"""Who scores the student's tokens."""

from stable_opd.teachers.base import Teacher
from stable_opd.teachers.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]

"""Who scores the student's tokens."""

from stable_opd.teachers.base import Teacher
from stable_opd.teachers.cached import CachedTeacher
from stable_opd.teachers.local import LocalTeacher
from stable_opd.teachers.myself import SelfTeacher
from stable_opd.teachers.privileged import PrivilegedTeacher
from stable_opd.teachers.routed import RoutedTeacher
from stable_opd.teachers.vllm import VLLMTeacher

__all__ = [
    "CachedTeacher",
    "LocalTeacher",
    "PrivilegedTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
    "VLLMTeacher",
]

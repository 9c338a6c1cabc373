"""Who scores the student's tokens."""

from stable_opd.teachers.base import Teacher
from stable_opd.teachers.local import LocalTeacher
from stable_opd.teachers.vllm import VLLMTeacher

__all__ = ["LocalTeacher", "Teacher", "VLLMTeacher"]

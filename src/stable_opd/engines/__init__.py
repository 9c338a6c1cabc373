"""Who runs generation."""

from stable_opd.engines.base import Completions, Request, RolloutEngine
from stable_opd.engines.in_process import InProcessEngine, LoopStop
from stable_opd.engines.transformers import TransformersEngine
from stable_opd.engines.vllm import VLLMEngine

__all__ = [
    "Completions",
    "InProcessEngine",
    "LoopStop",
    "Request",
    "RolloutEngine",
    "TransformersEngine",
    "VLLMEngine",
]

"""How the next token is drawn."""

from stable_opd.samplers.base import Sampler, draw
from stable_opd.samplers.min_p import MinP, near_likeliest
from stable_opd.samplers.temperature import Temperature, tempered
from stable_opd.samplers.top_k import TopK, likeliest
from stable_opd.samplers.top_p import TopP, nucleus

__all__ = [
    "MinP",
    "Sampler",
    "Temperature",
    "TopK",
    "TopP",
    "draw",
    "likeliest",
    "near_likeliest",
    "nucleus",
    "tempered",
]

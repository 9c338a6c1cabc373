"""How the next token is drawn."""

from stable_opd.samplers.base import Sampler, draw
from stable_opd.samplers.temperature import Temperature, tempered
from stable_opd.samplers.top_p import TopP, nucleus

__all__ = ["Sampler", "Temperature", "TopP", "draw", "nucleus", "tempered"]

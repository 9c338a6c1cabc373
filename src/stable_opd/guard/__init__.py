"""Noticing a collapse by its early signs, and answering it."""

from stable_opd.guard.callback import CollapseGuard
from stable_opd.guard.ladder import Action, Ladder

__all__ = ["Action", "CollapseGuard", "Ladder"]

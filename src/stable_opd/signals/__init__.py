"""What moves before and in a collapse, and the rule that says when a signal has moved. Nothing here knows a trainer."""

from stable_opd.signals.changes import Change, Detector, Effect, find_change
from stable_opd.signals.watch import SIGNALS, Signal, Watch

__all__ = ["SIGNALS", "Change", "Detector", "Effect", "Signal", "Watch", "find_change"]

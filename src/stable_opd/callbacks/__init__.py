"""What happens beside the training."""

from stable_opd.callbacks.answers import AnswerWriter
from stable_opd.callbacks.checkpoint import RunCheckpoint
from stable_opd.callbacks.progress import OPDProgressBar
from stable_opd.callbacks.samples import RolloutSamples

__all__ = ["AnswerWriter", "OPDProgressBar", "RolloutSamples", "RunCheckpoint"]

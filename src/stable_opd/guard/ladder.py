"""What is done when a collapse begins: weights up, then back, then the end. Nothing here knows a trainer."""

from typing import Any, Literal

Action = Literal["raise", "lower", "roll back", "stop"]


class Ladder:
    """Decides after each step what is to be done.

    While there is an alarm, and the last answer has had its time to work, the next one is given: so many times the
    weights are raised, then so many times the run goes back with weights raised once more, then it stops. When there
    was none for a while, the weights are lowered by one level; the time that this takes is multiplied by how often
    they were raised so far, so that a run which needs the weights keeps them longer and longer.

    Args:
        raises: Times that the weights are raised before the run goes back.
        rollbacks: Times that the run goes back before it stops.
        patience: Steps that an answer is given to work.
        calm: Steps without an alarm after which the weights are lowered by a level.

    Attributes:
        level: How often the weights are raised, less how often they were lowered.
        returns: How often the run went back.
    """

    def __init__(self, raises: int, rollbacks: int, patience: int, calm: int) -> None:
        self.raises, self.rollbacks, self.patience, self.calm = raises, rollbacks, patience, calm
        self.level = self.returns = 0
        self._raised = self._quiet = 0
        self._waited = patience  # the first answer comes at once

    def decide(self, alarm: bool) -> Action | None:
        """Learn of a step, and return what is to be done after it."""
        self._waited += 1
        self._quiet = 0 if alarm else self._quiet + 1
        if alarm and self._waited > self.patience:
            return self._answer()
        if self.level and self._quiet >= self.calm * self._raised:
            self.level, self._quiet = self.level - 1, 0
            return "lower"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers that the next decision depends on."""
        return {name: getattr(self, name) for name in ("level", "returns", "_raised", "_quiet", "_waited")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

    def _answer(self) -> Action:
        self._waited = 0
        if self.level < self.raises + self.returns:
            self.level, self._raised = self.level + 1, self._raised + 1
            return "raise"
        if self.returns < self.rollbacks:
            self.returns, self.level, self._raised = self.returns + 1, self.level + 1, self._raised + 1
            return "roll back"
        return "stop"

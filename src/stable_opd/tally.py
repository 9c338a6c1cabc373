"""What the micro-batches of one step add up to, over all processes."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from stable_opd.diagnostics import Diagnostics
from stable_opd.streaming import StreamedLoss

#: Bins of the positions that a token budget allows.
BINS = 10


class Tally:
    """Sums over the micro-batches of one step, and the diagnostics of the student's tokens.

    Every process asks for the same sums, also one that has none of the student's tokens: processes wait for each other.

    Args:
        shares: Share of each token in the mean of each term, (N,), by the names of the terms.
        device: Where the sums are.
        expected: Whether some process compares student and teacher; the same on every process.
    """

    #: Means over the student's tokens: the logged name, what it is the mean of, and the weights.
    MEANS: ClassVar = {
        "logprob_student": ("student", "own"),
        "logprob_teacher": ("teacher", "own"),
        "entropy_student": ("entropy_student", "stands_for"),
        "entropy_teacher": ("entropy_teacher", "stands_for"),
        "overlap": ("overlap", "stands_for"),
        "overlap_advantage": ("overlap_advantage", "overlapping"),
        "entropy_gap": ("entropy_gap", "stands_for"),
        "stop_hazard": ("stop_student", "own"),
        "stop_mass_student": ("stop_student", "stopped"),
        "stop_mass_teacher": ("stop_teacher", "stopped"),
    }

    def __init__(self, shares: Mapping[str, Tensor], device: torch.device, expected: bool = True) -> None:
        self.losses = {name: torch.zeros((), dtype=torch.float32, device=device) for name in shares}
        self.values = {name: torch.zeros((), dtype=torch.float32, device=device) for name in shares}
        self.shares = {name: each.sum() for name, each in shares.items()}
        self.expected = expected
        self.diagnostics = Diagnostics()
        self.device = device

    def add(self, result: StreamedLoss) -> None:
        """Add one micro-batch."""
        for name in result.losses:
            self.losses[name] = self.losses[name] + result.losses[name]
            self.values[name] = self.values[name] + result.values[name]
        self.diagnostics.extend(result.diagnostics)

    @property
    def compares(self) -> bool:
        """Whether this process compared student and teacher."""
        return "student" in self.diagnostics

    def tokens(self, name: str) -> Tensor:
        """Return a diagnostic of the tokens of the rows that the student had a part in."""
        if name == "entropy_gap":
            return (self.tokens("entropy_teacher") - self.tokens("entropy_student")).abs()
        return self.diagnostics[name]

    def of_students(self) -> dict[str, Tensor]:
        """Return ``advantage`` and ``in_loop`` of the tokens that the student wrote, (n,) each; n may be 0."""
        if not self.compares:
            nothing = torch.zeros(0, dtype=torch.float32, device=self.device)
            return {"advantage": nothing, "in_loop": nothing.bool()}
        own = self.tokens("own")
        advantage = self.tokens("teacher") - self.tokens("student")
        return {"advantage": advantage[own], "in_loop": self.tokens("in_loop")[own]}

    def reduced(self, total: Callable[[Tensor], Tensor], penalties: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the scalars to log, added up over all processes in one go.

        Args:
            total: Adds up over all processes.
            penalties: Losses and values, under their names, that belong to no token and are the same on every process.

        Returns:
            ``loss``, and ``loss/<term>`` and ``value/<term>`` of each term. A value is a mean over the tokens that the
            term was asked about, without the weights that scale its loss; over no token it is nan.
        """
        count = len(self.losses)
        sums = [*self.losses.values(), *self.values.values(), *self.shares.values()]
        losses, values, shares = total(torch.stack(sums).float()).split(count)
        logged: dict[str, Any] = {f"loss/{name}": loss for name, loss in zip(self.losses, losses, strict=True)}
        logged |= {f"value/{name}": value for name, value in zip(self.values, values / shares, strict=True)}
        logged |= penalties or {}
        loss = torch.stack([logged[f"loss/{name}"].to(losses) for name in self.losses]).sum()
        return {"loss": loss, **logged}

    def compared(self, total: Callable[[Tensor], Tensor], budget: int) -> dict[str, Tensor]:
        """Return how student and teacher compare, added up over all processes in one go.

        Args:
            total: Adds up over all processes.
            budget: Tokens that an answer may have; the bins of the positions are the same for every batch.

        Returns:
            The means of `MEANS`, and ``kl_by_position/0`` to ``/9``: mean KL(student || teacher), in nats, by the
            tenth of the budget; a mean over no token is nan. Nothing if nobody was to compare the two.
        """
        if not self.expected:
            return {}
        names = [*self.MEANS, *(f"kl_by_position/{number}" for number in range(BINS))]
        sums, weights = total(torch.cat([self._sums(), self._by_position(budget)], -1))
        return dict(zip(names, sums / weights, strict=True))

    def _sums(self) -> Tensor:
        """Return the weighted sum of each mean, and the sum of its weights, (2, means) float32."""
        if not self.compares:
            return torch.zeros(2, len(self.MEANS), dtype=torch.float32, device=self.device)
        pairs = [(self.tokens(name), self.tokens(weight).float()) for name, weight in self.MEANS.values()]
        sums = [(values * weights).sum() for values, weights in pairs]
        return torch.stack([torch.stack(sums), torch.stack([weights.sum() for _, weights in pairs])]).float()

    def _by_position(self, budget: int) -> Tensor:
        """Return the weighted sum of the divergences in each bin, and the sum of the weights, (2, bins) float32."""
        sums = torch.zeros(2, BINS, dtype=torch.float32, device=self.device)
        if not self.compares:
            return sums
        weights = self.tokens("stands_for")
        places = (self.tokens("position") * BINS // budget).clamp(max=BINS - 1)
        return sums.index_add_(1, places, torch.stack([weights * self.tokens("kl"), weights]))

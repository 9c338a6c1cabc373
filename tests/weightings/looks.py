"""Looks at ragged rows that are drawn at random, and looks at a part of their rows."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from helpers import make_rollout
from stable_opd import Author, Finish, Repetition
from stable_opd.look import Glance, Look
from stable_opd.types import Rollout

TOKENS = 7


def draw(seed: int, lengths: list[int] | None = None, progress: float = 0.0, mixed: bool = True) -> Look:
    """Rows of several lengths, some empty, some golden, and some that somebody else began."""
    generator = torch.Generator().manual_seed(seed)
    if lengths is None:
        lengths = torch.randint(
            0, 13, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator
        ).tolist()
    rows = [torch.randint(TOKENS, (length,), generator=generator).tolist() for length in lengths]
    count = sum(lengths)
    authors = torch.rand(len(rows), generator=generator) < (0.2 if mixed else 0.0)
    author = [Author.GOLDEN if golden else Author.STUDENT for golden in authors]
    token_author = torch.tensor([int(each) for each in author]).repeat_interleave(
        torch.tensor(lengths, dtype=torch.long)
    )
    if mixed:
        token_author[torch.rand(count, generator=generator) < 0.15] = int(Author.TEACHER)
    finish = [Finish(int(each)) for each in torch.randint(3, (len(rows),), generator=generator)]
    rollout = make_rollout(
        rows,
        authors=author,
        finish=finish,
        behaviour=-torch.rand(count, generator=generator),
        token_authors=token_author,
    )
    seen = Glance(*(torch.rand(4, count, generator=generator) * torch.tensor([[-1.0], [-2.0], [3.0], [1.0]])))
    return look_of(rollout, progress, seen)


def look_of(
    rollout: Rollout,
    progress: float = 0.0,
    seen: Glance | None = None,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> Look:
    """Look at rows that do not repeat themselves; what the models say is 0 where the student did not write."""
    own = rollout.token_author == Author.STUDENT
    if seen is not None:
        seen = Glance(*(getattr(seen, field.name) * own for field in fields(seen)))
    nothing = Repetition(torch.zeros_like(own), torch.zeros(len(rollout), dtype=torch.bool))
    return Look(rollout, nothing, progress, own, gather, seen)


def part(look: Look, rows: Tensor, gather: Callable[[Tensor], Tensor] = lambda values: values) -> Look:
    """Look at some of the rows."""
    places = look.rollout.places(rows)
    seen = look.glance and Glance(*(getattr(look.glance, field.name)[places] for field in fields(look.glance)))
    return look_of(look.rollout.select(rows), look.progress, seen, gather)


def halves(look: Look) -> tuple[Tensor, Tensor]:
    """Rows of two processes: every other one, so that the order is not that of one process."""
    numbers = torch.arange(len(look.rollout))
    return numbers[::2], numbers[1::2]


def of_rows(look: Look, values: Tensor) -> list[list[float]]:
    """Take packed values apart."""
    return [row.tolist() for row in values.split(look.rollout.lengths.tolist())]


class Meeting:
    """Two looks that gather each other's values: run the first with recorded values of the second, and back.

    Every process has to gather the same number of times; the n-th values of one meet the n-th of the other.
    """

    def __init__(self, look: Look, rows: tuple[Tensor, Tensor]) -> None:
        self.look, self.rows = look, rows
        self.said: list[list[Tensor]] = [[], []]

    def run(self, weightings: tuple, rounds: int = 3) -> list[Tensor]:
        """Return the weights of both processes; they are asked again until both heard what the other says."""
        states = [weighting.state_dict() for weighting in weightings]
        weights: list[Tensor] = []
        for _ in range(rounds):
            heard, self.said, weights = self.said, [[], []], []
            for process, (weighting, state) in enumerate(zip(weightings, states, strict=True)):
                weighting.load_state_dict(state)
                weights.append(weighting(part(self.look, self.rows[process], self._gather(process, heard))))
        assert len(self.said[0]) == len(self.said[1])
        return weights

    def _gather(self, process: int, heard: list[list[Tensor]]) -> Callable[[Tensor], Tensor]:
        def gather(values: Tensor) -> Tensor:
            number = len(self.said[process])
            self.said[process].append(values)
            other = heard[1 - process]
            theirs = other[number] if number < len(other) else values[:0]
            return torch.cat([values, theirs] if process == 0 else [theirs, values])

        return gather

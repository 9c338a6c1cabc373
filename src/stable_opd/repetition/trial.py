"""How well a detector works: on texts that are known to loop from a token on, and on golden texts, which do not."""

import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from stable_opd.randomness import key
from stable_opd.repetition.base import RepetitionDetector
from stable_opd.types import Author, Finish, Repetition, Rollout

Decode = Callable[[Sequence[Sequence[int]]], list[str]]

#: Probability that a token of a noisy loop is another one.
NOISE = 0.05


@dataclass(frozen=True, slots=True)
class Specimen:
    """A text that loops.

    Attributes:
        tokens: All of it, up to the token budget.
        onset: How many tokens stand before the first repeated one, which begins the second copy.
    """

    tokens: list[int]
    onset: int


def exact_loop(text: Sequence[int], period: int, budget: int, rng: random.Random) -> Specimen:
    """Break a text off somewhere, and repeat its last tokens to the end of the budget.

    Args:
        text: Tokens of a golden text, at least ``period``.
        period: Tokens of the block that is repeated.
        budget: Tokens of the whole.
        rng: Says where it breaks off.
    """
    onset = rng.randrange(period, min(len(text), budget) + 1)
    head = list(text[:onset])
    return Specimen(head + [head[onset - period + place % period] for place in range(budget - onset)], onset)


def counting_loop(text: Sequence[int], period: int, budget: int, rng: random.Random) -> Specimen:
    """A loop in which one token of the block is another one in each copy, as in "step 41, step 42"."""
    loop = exact_loop(text, period, budget, rng)
    for place in range(loop.onset + rng.randrange(period), budget, period):
        loop.tokens[place] = rng.choice(text)
    return loop


def noisy_loop(text: Sequence[int], period: int, budget: int, rng: random.Random) -> Specimen:
    """A loop in which a token is now and then another one of the text, with probability `NOISE`."""
    loop = exact_loop(text, period, budget, rng)
    for place in range(loop.onset, budget):
        if rng.random() < NOISE:
            loop.tokens[place] = rng.choice(text)
    return loop


LOOPS = {"exact": exact_loop, "counting": counting_loop, "noisy": noisy_loop}


@dataclass(frozen=True)
class Trial:
    """Conditions under which detectors are compared.

    Attributes:
        golden: Tokens of golden texts, without a stop token.
        decode: Turns rows of tokens into their texts.
        stop: A stop token, which ends the golden texts.
        periods: Tokens of the blocks that are repeated.
        budget: Tokens at which a loop is cut off.
        every: Tokens after which a growing text is looked at again.
        seed: Seed of the places at which texts begin to loop.
    """

    golden: Sequence[Sequence[int]]
    decode: Decode
    stop: int
    periods: Sequence[int]
    budget: int
    every: int = 1
    seed: int = 0

    def run(self, detector: RepetitionDetector) -> dict[str, float]:
        """Return the figures of a detector.

        ``golden/flagged`` and ``golden/marked`` are the shares of golden texts and of their tokens that it takes for a
        loop; ``golden/flagged_early`` counts the texts that it would have flagged at any time while they were written.
        For each sort of loop and period, such as ``exact-4``, ``/found`` is the share of loops that are flagged before
        the budget ends, and ``/delay`` the median number of tokens from the first repeated one until then, over those
        that are. ``loops/`` is over all of them; ``loops/recall`` and ``loops/precision`` are those of the marks on
        whole texts: marked tokens of the loop over tokens of the loop, and over marked tokens.

        Raises:
            ValueError: If a text is too short to loop with any of the periods.
        """
        figures = self._golden(detector)
        delays: list[int] = []
        marks = torch.zeros(3, dtype=torch.long)
        specimens = 0
        for name, loops in self.specimens().items():
            found = [delay for loop in loops if (delay := self._delay(detector, loop)) is not None]
            figures[f"{name}/found"] = len(found) / len(loops)
            figures[f"{name}/delay"] = statistics.median(found) if found else float("nan")
            marks += sum(self._marks(detector, loop) for loop in loops)
            delays += found
            specimens += len(loops)
        hits, looping, marked = marks.tolist()
        return figures | {
            "loops/found": len(delays) / specimens,
            "loops/delay": statistics.median(delays) if delays else float("nan"),
            "loops/recall": hits / looping,
            "loops/precision": hits / marked if marked else float("nan"),
        }

    def specimens(self) -> Mapping[str, list[Specimen]]:
        """Return loops by sort and period; a block of one token has no sort but the exact one.

        Raises:
            ValueError: If no text is as long as a period, or the budget leaves no room for a loop.
        """
        found = {}
        for period in self.periods:
            texts = [text for text in self.golden if len(text) >= period]
            if not texts or self.budget <= max(map(len, texts)):
                raise ValueError(
                    f"Expected texts of at least {period} tokens and a budget above the longest, but got "
                    f"{min(map(len, self.golden))} to {max(map(len, self.golden))} tokens and a budget of "
                    f"{self.budget}. Leave out long periods, or raise the budget."
                )
            for name, make in LOOPS.items():
                if period > 1 or name == "exact":
                    keyed = (random.Random(key(self.seed, name, period, place)) for place in range(len(texts)))
                    found[f"{name}-{period}"] = [
                        make(text, period, self.budget, rng) for text, rng in zip(texts, keyed, strict=True)
                    ]
        return found

    def _golden(self, detector: RepetitionDetector) -> dict[str, float]:
        whole = self._look(detector, [[*text, self.stop] for text in self.golden], Finish.STOP)
        early = [
            bool(self._look(detector, self._prefixes(text, 0)).repetitive.any()) for text in self.golden
        ]  # text by text, because some detectors compare all periods of all rows at once
        return {
            "golden/flagged": float(whole.repetitive.float().mean()),
            "golden/flagged_early": sum(early) / len(early),
            "golden/marked": float(whole.in_loop.float().mean()),
        }

    def _delay(self, detector: RepetitionDetector, loop: Specimen) -> int | None:
        """Return how many tokens into the loop it is flagged; None if it never is."""
        flags = self._look(detector, self._prefixes(loop.tokens, loop.onset)).repetitive
        return (int(flags.int().argmax()) + 1) * self.every if flags.any() else None

    def _marks(self, detector: RepetitionDetector, loop: Specimen) -> torch.Tensor:
        """Return how many tokens of a whole text are marked rightly, how many should be, and how many are, (3,)."""
        marks = self._look(detector, [loop.tokens]).in_loop
        return torch.stack([marks[loop.onset :].sum(), torch.tensor(len(loop.tokens) - loop.onset), marks.sum()])

    def _prefixes(self, tokens: Sequence[int], start: int) -> list[Sequence[int]]:
        """Return what is there each time that a growing text is looked at; the whole at least."""
        ends = range(start + self.every, len(tokens) + 1, self.every)
        return [tokens[:end] for end in ends] or [tokens]

    @torch.no_grad()
    def _look(
        self, detector: RepetitionDetector, rows: Sequence[Sequence[int]], finish: Finish = Finish.LENGTH
    ) -> Repetition:
        found: Repetition = detector(answers(rows, self.decode, finish))
        return found


def answers(rows: Sequence[Sequence[int]], decode: Decode, finish: Finish) -> Rollout:
    """Return texts as if a student had written them, without prompts."""
    lengths = torch.tensor([len(row) for row in rows])
    filled = partial(torch.full_like, lengths)
    return Rollout(
        tokens=torch.tensor([token for row in rows for token in row]),
        prompt_lengths=filled(0),
        lengths=lengths,
        prompt=torch.arange(len(rows)),
        author=filled(int(Author.STUDENT)),
        finish=filled(int(finish)),
        behaviour_logprobs=torch.zeros(int(lengths.sum())),
        token_author=torch.full((int(lengths.sum()),), int(Author.STUDENT)),
        texts=decode(rows),
        fields=[{}] * len(rows),
    )

"""Evidence, rollouts and looks that are drawn at random, to show to a component."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stable_opd.look import Glance, Look
from stable_opd.terms import LossTerm
from stable_opd.types import NOT_SCORED, Author, Evidence, Finish, Prompts, Repetition, Rollout, Scores

VOCABULARY = 41

#: Tokens of each row, and how many of them somebody else wrote; the fourth row goes round in circles.
LENGTHS = (9, 1, 7, 14, 5)
BEGUN = (0, 0, 3, 0, 5)


@dataclass(frozen=True)
class Scene:
    """Some positions.

    Attributes:
        facts: What is known of them, without scores.
        logits: What student, teacher and reference say there, (3, n, V).
    """

    facts: Evidence
    logits: Tensor

    def part(self, places: Tensor) -> "Scene":
        """Return the scene of some positions; their rows are numbered from 0."""
        facts = self.facts
        return Scene(
            replace(
                facts,
                tokens=facts.tokens[places],
                row=facts.row[places].unique_consecutive(return_inverse=True)[1],
                position=facts.position[places],
                in_loop=facts.in_loop[places],
                author=facts.author[places],
                behaviour_logprobs=facts.behaviour_logprobs[places],
            ),
            self.logits[:, places],
        )


def draw(
    dtype: torch.dtype = torch.float64, scale: float = 2.0, others: Sequence[Author] = (Author.GOLDEN,), seed: int = 0
) -> Scene:
    """Draw rows of several authors, one of which repeats itself.

    Args:
        dtype: Precision of what the models say.
        scale: Size of the logits.
        others: Who writes what the student did not, in turn.
        seed: Decides everything.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS)
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(length) for length in LENGTHS])
    tokens = torch.randint(VOCABULARY, (len(row),), generator=generator)
    tokens[row == 3] = tokens[row == 3][torch.arange(LENGTHS[3]) % 3]
    begun = position < torch.tensor(BEGUN)[row]
    turns = torch.tensor([int(others[place % len(others)]) for place in range(len(lengths))])
    author = torch.where(begun, turns[row], int(Author.STUDENT))
    logits = scale * torch.randn(3, len(row), VOCABULARY, generator=generator, dtype=torch.float64)
    noise = 0.1 * torch.randn(len(row), generator=generator, dtype=torch.float64)
    drawn = logits[0].log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    behaviour = torch.where(author == Author.GOLDEN, 0.0, (drawn + noise).clamp(min=-9.0, max=-1e-3))
    in_loop = (row == 3) & (position >= 3)
    facts = Evidence(tokens, row, position, in_loop, author, behaviour.to(dtype), progress=0.5, stop=(0, 3))
    return Scene(facts, logits.to(dtype))


class TopOnly(Scores):
    """A teacher that tells the log-probs of the written tokens and its likeliest tokens, and nothing else."""

    def __init__(self, sampled: Tensor, everything: Tensor) -> None:
        super().__init__(sampled)
        self._everything = everything

    @property
    def logprobs(self) -> Tensor:
        """Not to be had.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            'The teacher\'s log-probs of the whole vocabulary are not there for a support of "topk". Declare support = '
            '"full", or read `top`.'
        )

    def top(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k likeliest tokens and their log-probs."""
        return Scores(logprobs=self._everything).top(k)


def show(term: LossTerm, scene: Scene, student: Tensor | None = None, everything: bool = False) -> Evidence:
    """Return the evidence that a term declared to need, and no more.

    Args:
        term: Who will read it.
        scene: The positions.
        student: Logits of the student, through which a gradient flows, (n, V); none takes those of the scene.
        everything: Show the student's whole vocabulary, as to `LossTerm.closed_form`.
    """
    ours, theirs, initial = (
        logits.log_softmax(-1) for logits in (scene.logits[0] if student is None else student, *scene.logits[1:])
    )
    tokens, full = scene.facts.tokens, everything or term.support != "sampled"
    teacher = reference = NOT_SCORED
    if term.needs_teacher:
        teacher = _scores(theirs, tokens, full)
        if term.support == "topk":
            teacher = TopOnly(teacher.sampled, theirs)
    if term.needs_reference:
        reference = _scores(initial, tokens, full)
    return scene.facts.seen(slice(None), _scores(ours, tokens, full), teacher, reference)


def _scores(logprobs: Tensor, tokens: Tensor, full: bool) -> Scores:
    sampled = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    return Scores(sampled, logprobs if full else None)


def make_rollout(rows: Sequence[Sequence[int]], finish: Finish = Finish.LENGTH) -> Rollout:
    """Pack rows of the student's, each behind a prompt of one token; every third one ends by a stop token."""
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    reasons = [Finish.STOP if place % 3 == 2 and row else finish for place, row in enumerate(rows)]
    flat = [token for row in rows for token in (1, *row)]
    generator = torch.Generator().manual_seed(5)
    author = torch.full_like(lengths, int(Author.STUDENT))
    return Rollout(
        tokens=torch.tensor(flat, dtype=torch.long),
        prompt_lengths=torch.ones_like(lengths),
        lengths=lengths,
        prompt=torch.arange(len(rows)),
        author=author,
        finish=torch.tensor([int(reason) for reason in reasons], dtype=torch.long),
        behaviour_logprobs=-torch.rand(int(lengths.sum()), generator=generator),
        token_author=author.repeat_interleave(lengths),
        texts=[" ".join(f"word number {token}" for token in row) for row in rows],
        fields=[{}] * len(rows),
    )


def rollouts() -> dict[str, Rollout]:
    """Return rollouts by what is special about them."""
    generator = torch.Generator().manual_seed(7)

    def noise(count: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (count,), generator=generator).tolist()

    return {
        "loops beside regular rows": make_rollout(
            [noise(60), [7, 8, 9, 10] * 250, [], noise(3) * 90, noise(1), noise(90)]
        ),
        "only empty rows": make_rollout([[], []]),
        "no rows": make_rollout([]),
    }


def look(rollout: Rollout, scored: bool, seed: int = 3) -> Look:
    """Return a look at a rollout.

    Args:
        rollout: The rows.
        scored: Whether the models were asked.
        seed: Decides what they say.
    """
    count = int(rollout.lengths.sum())
    said = torch.rand(4, count, generator=torch.Generator().manual_seed(seed))
    said = said * torch.tensor([[-1.0], [-2.0], [3.0], [1.0]])
    marks = Repetition(torch.zeros(count, dtype=torch.bool), torch.zeros(len(rollout), dtype=torch.bool))
    own = rollout.token_author == Author.STUDENT
    return Look(rollout, marks, 0.5, own, lambda values: values, Glance(*said) if scored else None)


def prompts() -> Prompts:
    """Return three problems with golden solutions."""
    golden: list[list[int] | None] = [[6, 7, 2], [8, 2], [9, 10, 11, 2]]
    return Prompts([[4, 5], [6], [7, 8, 9]], golden, [0, 1, 2], [{"answer": "1"}] * 3)

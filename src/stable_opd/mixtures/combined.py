"""Several mixtures at once."""

from torch import Tensor, nn

from stable_opd.mixtures.base import Mixture, brought, nothing
from stable_opd.terms import SUPPORTS
from stable_opd.types import Author, Evidence, Plan, Prompts, Rollout, TokenLoss


class CombinedMixture(Mixture):
    """Several mixtures at once, each with tokens of another author: golden rows beside replay, say.

        sum over parts of the part's loss on the tokens of its authors

    At most one of them may begin the student's answers, and at most one may have a say in their tokens. The student's
    rows are those of the part that plans the fewest, so a batch that `GKDMixture` gives to others is theirs. Each
    author has a mean of its own, so no part's weight depends on how many rows another has.

    Source: none of its own; the parts name theirs.

    Args:
        parts: The mixtures; each keeps its own weight and schedule.
    """

    def __init__(self, parts: list[Mixture]) -> None:
        super().__init__()
        authors = [author for part in parts for author in part.authors]
        twice = sorted({author.name for author in authors if authors.count(author) > 1})
        many = max((sum(part.blends for part in parts), sum(part.begins for part in parts)))
        if len(parts) == 0 or twice or many > 1:
            raise ValueError(
                "Expected mixtures with tokens of different authors, of which one at most blends and one at most "
                f"begins the student's answers, but got {', '.join(type(part).__name__ for part in parts) or 'none'}"
                f"{' (two with tokens by ' + ', '.join(twice) + ')' if twice else ''}. "
                f"{'Leave one of them out.' if parts else 'Name one, or choose StudentOnly.'}"
            )
        self.parts = nn.ModuleList(parts)
        self.authors = tuple(authors)
        self.support = max((part.support for part in parts), key=SUPPORTS.index)
        self.positionwise = all(part.positionwise for part in parts)
        for need in ("needs_teacher", "needs_reference", "needs_golden", "needs_writing_teacher", "blends", "begins"):
            setattr(self, need, any(getattr(part, need) for part in parts))
        if self.support != "sampled" and not all(part.support != "sampled" or part.positionwise for part in parts):
            raise ValueError(
                "Expected parts that can be looked at together, but got one that follows whole rows and one over the "
                "vocabulary, which is looked at in pieces. Choose a loss that looks at each token by itself, such as "
                "SampledReverseKL without a discount."
            )

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows once, and the others' after them."""
        plans = [part.plan(prompts, samples, progress, step) for part in self._parts()]
        planned = [list(zip(plan.prompt, plan.author, strict=True)) for plan in plans]
        rows = min(([each for each in plan if each[1] == Author.STUDENT] for plan in planned), key=len)
        rows += [each for plan in planned for each in plan if each[1] != Author.STUDENT]
        begun = next((plan for plan in plans if plan.prefix), plans[0])
        return Plan([prompt for prompt, _ in rows], [author for _, author in rows], begun.prefix, begun.prefix_author)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the loss of the mixture that each token belongs to."""
        loss, value, where = nothing(evidence)
        for part in self._parts():
            term = part(evidence)
            mine = term.where & brought(evidence, part.authors) if part.authors else term.where
            loss = loss + term.loss.masked_fill(~mine, 0)
            value = value + term.value.masked_fill(~mine, 0)
            where = where | mine
        return TokenLoss(loss, value, where)

    def blend(self, student: Tensor, teacher: Tensor, progress: float) -> Tensor:
        """Return the logits of the mixture that has a say."""
        return next(part for part in self._parts() if part.blends).blend(student, teacher, progress)

    def revise(self, rollout: Rollout, step: int) -> Rollout:
        """Let each mixture add its rows."""
        for part in self._parts():
            rollout = part.revise(rollout, step)
        return rollout

    def _parts(self) -> list[Mixture]:
        return [part for part in self.parts if isinstance(part, Mixture)]

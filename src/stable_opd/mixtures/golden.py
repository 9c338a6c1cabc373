"""The student's rollouts together with golden solutions."""

import math

from stable_opd.divergences.base import Divergence
from stable_opd.mixtures.base import Mixture, WeightedMixture, check_weight
from stable_opd.mixtures.student import student_rows, with_rows
from stable_opd.schedules import Schedule, scheduled
from stable_opd.types import Author, Evidence, Plan, Prompts, TokenLoss


def check_golden_rows(mixture: Mixture, prompts: Prompts) -> None:
    """Make sure that every prompt of a batch has a golden solution.

    Raises:
        ValueError: If one has none.
    """
    missing = [index for index, golden in zip(prompts.index, prompts.golden, strict=True) if not golden]
    if missing:
        raise ValueError(
            f"{type(mixture).__name__} needs a golden solution for every prompt, but {len(missing)} of {len(prompts)} "
            f"in this batch have none (the first is example {missing[0]}). Name the column that holds them with "
            "data.columns.golden, drop the examples without one, or use StudentOnly."
        )


class GoldenMixture(WeightedMixture):
    """One golden solution per prompt beside the rollouts, learnt by cross-entropy: Stable-OPD's mixture.

        weight * -log p(y*_t)

    The golden rows end with a stop token, so the student is reminded of stopping in every batch. With 0 rollouts per
    prompt this is supervised fine-tuning alone. With a ``loss`` it is offline distillation on the golden rows: the
    teacher says what each of their tokens should have been.

    Source: Luo et al. 2026 (arXiv 2604.08527), which does not publish its weight; a language-model term of weight 1
    beside distillation is what MiniLLM (arXiv 2306.08543) uses.

    Args:
        weight: The factor lambda_gold.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: A divergence over the vocabulary from the teacher; none takes the cross-entropy.
    """

    needs_golden: bool = True
    authors: tuple[Author, ...] = (Author.GOLDEN,)

    def __init__(self, weight: float = 1.0, schedule: Schedule | None = None, loss: Divergence | None = None) -> None:
        super().__init__(weight, schedule, loss)

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows, and after them one golden row for each prompt.

        Raises:
            ValueError: If a prompt has no golden solution.
        """
        check_golden_rows(self, prompts)
        return with_rows(student_rows(prompts, samples), prompts, 1, Author.GOLDEN)


class ShapedGolden(Mixture):
    """Golden solutions as off-policy samples: the pull is largest on tokens that are unlikely but not out of reach.

        weight * -p(y*_t) / (p(y*_t) + gamma),    with the gradient  -weight * gamma p / (p + gamma)^2 * grad log p

    The cross-entropy of `GoldenMixture` pulls with the same force however unlikely a token is. Here the force has its
    peak of weight / 4 at p = gamma: tokens that the student already writes are let go, and so are those that it rules
    out, which would tear it away from what it knows. The larger gamma is against p, the more it is like plain
    importance sampling, -p / gamma.

    Source: LUFFY's policy shaping (Yan et al. 2025, arXiv 2504.14945), with the behaviour's probability set to 1 as
    there, and an advantage of 1 because there are no rewards here.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        gamma: Probability of a token at which the pull is largest, above 0.
    """

    needs_golden: bool = True
    positionwise: bool = True
    authors: tuple[Author, ...] = (Author.GOLDEN,)

    def __init__(self, weight: float = 1.0, schedule: Schedule | None = None, gamma: float = 0.1) -> None:
        super().__init__()
        check_weight(weight)
        if gamma <= 0:
            raise ValueError(
                f"Expected gamma above 0, but got {gamma}. The larger it is, the more likely are the tokens that pull "
                "hardest; the source has 0.1."
            )
        self.weight = weight
        self.schedule = schedule
        self.gamma = gamma

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows, and after them one golden row for each prompt.

        Raises:
            ValueError: If a prompt has no golden solution.
        """
        check_golden_rows(self, prompts)
        return with_rows(student_rows(prompts, samples), prompts, 1, Author.GOLDEN)

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted loss of each golden token; the value is its cross-entropy."""
        weight = scheduled(self.weight, self.schedule, evidence.progress)
        loss = -weight * (evidence.student.sampled - math.log(self.gamma)).sigmoid()  # p / (p + gamma)
        return TokenLoss(loss, -evidence.student.sampled.detach(), evidence.written_by(Author.GOLDEN))

"""The student's rollouts together with golden solutions."""

from stable_opd.mixtures.base import Mixture
from stable_opd.mixtures.student import student_rows
from stable_opd.schedules import Schedule, scheduled
from stable_opd.types import Author, Evidence, Plan, Prompts, TokenLoss


class GoldenMixture(Mixture):
    """One golden solution per prompt beside the rollouts, learnt by cross-entropy: Stable-OPD's mixture.

        weight * -log p(y*_t)

    The golden rows end with a stop token, so the student is reminded of stopping in every batch. With 0 rollouts per
    prompt this is supervised fine-tuning alone.

    Source: Luo et al. 2026 (arXiv 2604.08527), which does not publish its weight; a language-model term of weight 1
    beside distillation is what MiniLLM (arXiv 2306.08543) uses.

    Args:
        weight: The factor lambda_gold.
        schedule: Changes the weight in the course of the training; none keeps it constant.
    """

    needs_golden: bool = True
    positionwise: bool = True

    def __init__(self, weight: float = 1.0, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.schedule = schedule

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows, and after them one golden row for each prompt.

        Raises:
            ValueError: If a prompt has no golden solution.
        """
        missing = [index for index, golden in zip(prompts.index, prompts.golden, strict=True) if not golden]
        if missing:
            raise ValueError(
                f"GoldenMixture needs a golden solution for every prompt, but {len(missing)} of {len(prompts)} in this "
                f"batch have none (the first is example {missing[0]}). Name the column that holds them with "
                "data.columns.golden, drop the examples without one, or use StudentOnly."
            )
        own = student_rows(prompts, samples)
        count = len(prompts)
        return Plan([*own.prompt, *range(count)], [*own.author, *[Author.GOLDEN] * count])

    def forward(self, evidence: Evidence) -> TokenLoss:
        """Return the weighted cross-entropy of each golden token."""
        loss = -evidence.student.sampled
        weight = scheduled(self.weight, self.schedule, evidence.progress)
        return TokenLoss(weight * loss, loss.detach(), evidence.written_by(Author.GOLDEN))

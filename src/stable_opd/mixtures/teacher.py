"""Rows, or the beginnings of rows, that the teacher writes."""

from typing import Literal, get_args

from stable_opd.divergences.base import Divergence
from stable_opd.divergences.jensen_shannon import JensenShannon
from stable_opd.mixtures.base import WeightedMixture
from stable_opd.mixtures.golden import check_golden_rows
from stable_opd.mixtures.student import student_rows, with_rows
from stable_opd.randomness import global_seed, key, uniforms
from stable_opd.schedules import Cosine, Schedule
from stable_opd.types import Author, Plan, Prompts

Source = Literal["golden", "teacher"]


def _author(source: Source) -> Author:
    if source not in get_args(Source):
        raise ValueError(f"Expected a source out of {', '.join(get_args(Source))}, but got {source!r}.")
    return Author.GOLDEN if source == "golden" else Author.TEACHER


class TeacherMixture(WeightedMixture):
    """Rows that the teacher writes beside the rollouts, learnt by cross-entropy.

        weight * -log p(y_t),  y ~ teacher, at temperature 1

    For data without golden solutions. The teacher writes in this process and costs the time of its own rollouts;
    `GoldenMixture` costs nothing, and its rows are known to be right.

    Source: sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947) beside on-policy rows.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: A divergence over the vocabulary from the teacher; none takes the cross-entropy.
        teacher_samples: Rows of the teacher's for each prompt.
    """

    needs_writing_teacher: bool = True
    authors: tuple[Author, ...] = (Author.TEACHER,)

    def __init__(
        self,
        weight: float = 1.0,
        schedule: Schedule | None = None,
        loss: Divergence | None = None,
        teacher_samples: int = 1,
    ) -> None:
        super().__init__(weight, schedule, loss)
        if teacher_samples < 1:
            raise ValueError(
                f"Expected teacher_samples of at least 1, but got {teacher_samples}. Without them this is StudentOnly."
            )
        self.teacher_samples = teacher_samples

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows, and after them the teacher's."""
        return with_rows(student_rows(prompts, samples), prompts, self.teacher_samples, Author.TEACHER)


class GKDMixture(WeightedMixture):
    """Each batch is either the student's or somebody else's, by the throw of a coin: GKD's share of on-policy data.

    The others' rows, one for each prompt, are learnt by a divergence from the teacher. `GoldenMixture` has both in
    every batch, so each step is reminded of stopping.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649), whose lambda is ``on_policy``; 0.5 as in TRL. The student's
    batches are learnt by the module's divergence; for the published method it is that of the loss here.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: A divergence over the vocabulary from the teacher; none takes `JensenShannon`.
        on_policy: Probability that a batch is the student's.
        source: Who writes the other batches: ``golden`` solutions, or the ``teacher`` (seq_kd in TRL).
    """

    def __init__(
        self,
        weight: float = 1.0,
        schedule: Schedule | None = None,
        loss: Divergence | None = None,
        on_policy: float = 0.5,
        source: Source = "golden",
    ) -> None:
        super().__init__(weight, schedule, loss or JensenShannon())
        if not 0 <= on_policy <= 1:
            raise ValueError(f"Expected on_policy between 0 and 1, but got {on_policy}. It is a probability.")
        self.on_policy = on_policy
        self.author = _author(source)
        self.authors = (self.author,)
        self.needs_golden = source == "golden"
        self.needs_writing_teacher = source == "teacher"

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows or the others'; all processes throw the same coin.

        Raises:
            ValueError: If a prompt has no golden solution, and needs one.
        """
        coin = uniforms([key(global_seed(), "whose batch", step)], 1).item()
        if coin < self.on_policy:
            return student_rows(prompts, samples)
        if self.needs_golden:
            check_golden_rows(self, prompts)
        return with_rows(Plan([], []), prompts, 1, self.author)


class PrefixMixture(WeightedMixture):
    """Somebody else begins each answer and the student goes on; beginnings get shorter in the course of the training.

        tokens before the student's: floor(prefix * annealing(progress))

    The student learns from states that a good beginning leads to, so few rollouts go astray while it is weak, and the
    beginnings are learnt by cross-entropy. They count in the token budget of the answer, whose last token they leave to
    the student. With a prefix of 0 this is `StudentOnly`; `GoldenMixture` shows whole solutions, and leaves the student
    to begin by itself.

    Source: the teacher prefixes of TrOPD (arXiv 2606.01249), annealed to 0 by a cosine, learnt at a weight of 0.001.

    Args:
        weight: Factor of the term in the objective.
        schedule: Changes the weight in the course of the training; none keeps it constant.
        loss: A divergence over the vocabulary from the teacher; none takes the cross-entropy.
        prefix: Tokens of the longest beginning.
        annealing: Share of the length in the course of the training, from 0 to 1; none takes a `Cosine` from 1 to 0.
        source: Who begins: the ``golden`` solution, or the ``teacher``.
    """

    begins: bool = True

    def __init__(
        self,
        weight: float = 1.0,
        schedule: Schedule | None = None,
        loss: Divergence | None = None,
        prefix: int = 128,
        annealing: Schedule | None = None,
        source: Source = "golden",
    ) -> None:
        super().__init__(weight, schedule, loss)
        if prefix < 0:
            raise ValueError(f"Expected a prefix of at least 0 tokens, but got {prefix}. For none use StudentOnly.")
        self.prefix = prefix
        self.annealing = annealing or Cosine()
        self.author = _author(source)
        self.authors = (self.author,)
        self.needs_golden = source == "golden"
        self.needs_writing_teacher = source == "teacher"

    def plan(self, prompts: Prompts, samples: int, progress: float, step: int) -> Plan:
        """Plan the student's rows, with the beginnings that are due.

        Raises:
            ValueError: If a prompt has no golden solution, and needs one.
        """
        if self.needs_golden:
            check_golden_rows(self, prompts)
        length = int(self.prefix * min(max(float(self.annealing(progress)), 0.0), 1.0))
        return student_rows(prompts, samples)._replace(prefix=length, prefix_author=self.author)

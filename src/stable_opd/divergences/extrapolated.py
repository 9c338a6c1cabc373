"""A target beyond the teacher, from the sampled tokens."""

from torch import Tensor

from stable_opd.divergences.base import AdvantageDivergence
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform


class ExtrapolatedTeacher(AdvantageDivergence):
    """Sampled-token reverse KL to a teacher that is extrapolated away from the initial student.

        A_t = log q - log p + (factor - 1) (log q - log p_0),  p_0 the initial student

    What the teacher has over the initial student counts `factor` times. At every state it descends KL(p || r), with
    r = q^factor p_0^(1 - factor) / Z; the reported value leaves out the constant log Z, so it may well be negative.
    Below 1 the target lies between both. Answers get longer with the factor, and 1.5 was unstable. Prefer
    `SampledReverseKL`, the case of 1, unless the student is to pass its teacher.

    Source: ExOPD, in G-OPD (arXiv 2602.12125).

    Args:
        factor: How far to go from the initial student to the teacher, above 0; 1 is the teacher, which needs no
            initial student.
        clip: Half-width of the interval in which the importance ratio may move before its gradient is cut; None never
            cuts it.
        dual_clip: How much the ratio of a token of negative advantage may count, above 1; None means without bound.
        transform: Bounds the advantages; none leaves them as they are.
        baseline: What is subtracted from them to lower the variance; none subtracts nothing.
        discount: How much of the divergence that the row meets later, per token, a token answers for; 0 is local, 1
            the whole answer, with log Z left out.
    """

    needs_reference: bool = True

    def __init__(
        self,
        factor: float = 1.25,
        clip: float | None = 0.2,
        dual_clip: float | None = None,
        transform: AdvantageTransform | None = None,
        baseline: AdvantageBaseline | None = None,
        discount: float = 0.0,
    ) -> None:
        super().__init__(clip, dual_clip, transform, baseline, discount)
        if not factor > 0:
            raise ValueError(
                f"Expected a factor above 0, but got {factor}. At 0 the target is the initial student; for that use "
                "the constraint ReferenceKL."
            )
        self.factor = factor
        self.needs_reference = factor != 1

    def advantage(self, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return log q - log p + (factor - 1) (log q - log p_0)."""
        beyond = 0.0 if reference is None else (self.factor - 1) * (teacher - reference)
        return teacher - student + beyond

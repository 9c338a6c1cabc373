"""What is subtracted from an advantage so that its mean over the next token is 0: less variance, the same gradient."""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from stable_opd.registry import Component

#: The advantage as an elementwise function of the log-probs of student, teacher and, where it is read, reference.
Worth = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class AdvantageBaseline(Component):
    """A number per position that does not depend on the token that was drawn there.

    Such a number changes no expected gradient, since sum_v p_v grad log p_v = 0. It needs the whole vocabulary of all
    models, of which one tile is there at a time.
    """

    kind: ClassVar[str] = "baseline"

    @abstractmethod
    def __call__(self, worth: Worth, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return what is subtracted from the advantage at each position, (n,).

        Args:
            worth: Gives the advantage of tokens from their log-probs; it works on any shape.
            student: The student's log-probs, finite, (n, V).
            teacher: The teacher's, (n, V).
            reference: The initial student's, (n, V), where the advantage reads them.
        """


class ExactBaseline(AdvantageBaseline):
    """The mean advantage over the whole vocabulary.

        sum_v p_v A(v),  which is -KL(p || q) for `SampledReverseKL`

    What remains of the variance is that of the token against its alternatives; what the position as a whole is worth
    has gone. It costs about what `ReverseKL` costs, which has no variance at all: use it with transforms and with
    advantages that no divergence over the vocabulary stands for.

    Source: vOPD (arXiv 2605.07865).
    """

    def __call__(self, worth: Worth, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return the mean advantage of each position, (n,)."""
        worths = worth(student, teacher, reference)
        return torch.bmm(student.exp()[:, None], worths[:, :, None])[:, 0, 0]  # without another (n, V)


class TopKBaseline(AdvantageBaseline):
    """The mean advantage over the student's likeliest tokens, with all models renormalised on them.

        sum_S p'_v A'(v),  p' = p / sum_S p,  q' = q / sum_S q,  S the student's K likeliest tokens

    It stays unbiased, because S does not depend on the token that was drawn; it removes a little less of the variance
    than `ExactBaseline` and evaluates the advantage K times per position instead of V times.

    Source: vOPD (arXiv 2605.07865).

    Args:
        k: How many of the student's likeliest tokens; all of them if the vocabulary is smaller.
    """

    def __init__(self, k: int = 100) -> None:
        if k < 1:
            raise ValueError(f"Expected k of at least 1, but got {k}. Leave the baseline out for none.")
        self.k = k

    def __call__(self, worth: Worth, student: Tensor, teacher: Tensor, reference: Tensor | None) -> Tensor:
        """Return the mean advantage of each position among the tokens, (n,)."""
        top, tokens = student.topk(min(self.k, student.shape[-1]), -1)
        ours, theirs = top.log_softmax(-1), teacher.gather(-1, tokens).log_softmax(-1)
        initial = None if reference is None else reference.gather(-1, tokens).log_softmax(-1)
        return (ours.exp() * worth(ours, theirs, initial)).sum(-1)

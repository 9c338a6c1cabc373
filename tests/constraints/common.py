"""What the tests of constraints share: evidence drawn from logits, and every weighted constraint that is shipped."""

from dataclasses import replace
from functools import partial

import torch

from helpers import closed_form, make_evidence
from stable_opd import Evidence
from stable_opd.constraints import (
    EntropyFloor,
    EstimatedReferenceKL,
    LengthPenalty,
    RatioPenalty,
    ReferenceForwardKL,
    ReferenceKL,
    RepetitionPenalty,
    StopReferenceKL,
    Unlikelihood,
)
from stable_opd.controllers import Controller

AUTHORS = torch.tensor([0, 0, 1, 0, 2, 3])
STOP = (2, 5)
EVERYWHERE = 1e3  # above every entropy

#: By name, with what makes them speak about the evidence below.
FULL = {
    "reference": ReferenceKL,
    "forward": ReferenceForwardKL,
    "stop": StopReferenceKL,
    "floor": lambda weight=0.001, **rest: EntropyFloor(weight, EVERYWHERE, **rest),
}
SAMPLED = {
    "ratio": RatioPenalty,
    "length": lambda weight=1.0, **rest: LengthPenalty(weight, budget=6, buffer=4, **rest),
    "repetition": lambda weight=1.0, **rest: RepetitionPenalty(weight, n=1, **rest),
    "unlikelihood": lambda weight=1.0, **rest: Unlikelihood(weight, order=1, **rest),
}
#: Their gradient is right in expectation, and not that of their number.
ESTIMATED = {name: partial(EstimatedReferenceKL, estimator=name) for name in ("k2", "k3pp", "k4")}
ALL = FULL | SAMPLED | ESTIMATED


def draw_logits(seed=0, n=6, vocabulary=9, scale=3.0):
    """Logits of student and reference, (2, n, V) float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64) * scale


def see(student, reference=None, author=0, progress=0.0, behaviour=None) -> Evidence:
    """Evidence on one row, from logits, each (n, V); each token is written twice."""
    n = len(student)
    tokens = torch.arange(n) // 2
    behaviour = torch.full((n,), -1.5, dtype=student.dtype) if behaviour is None else behaviour
    theirs = None if reference is None else reference.log_softmax(-1)
    seen = make_evidence(
        tokens, student.log_softmax(-1), None, theirs, author=author, progress=progress, behaviour=behaviour
    )
    return replace(seen, stop=STOP)


def outcomes(term, student, reference, author=0):
    """Loss and gradient in the logits, by autograd and, where there is one, in closed form."""
    student = student.clone().requires_grad_()
    by_autograd = term(see(student, reference, author))
    (gradient,) = torch.autograd.grad(by_autograd.loss.sum(), student)
    if term.support == "sampled":
        return [(by_autograd, gradient)]
    with torch.no_grad():
        return [(by_autograd, gradient), closed_form(term, see(student, reference, author))]


class _Fixed(Controller):
    """A factor that stays."""

    def __init__(self, factor):
        super().__init__(1.0)
        self.factor = factor

    def next_factor(self, error):
        return self.factor

"""The estimated anchor against the exact one, by enumeration of what may be drawn."""

import pytest
import torch

from constraints.common import draw_logits
from helpers import make_evidence
from stable_opd.constraints import EstimatedReferenceKL, ReferenceKL

VOCABULARY = 7
each = pytest.mark.parametrize("name", ["k2", "k3pp", "k4"])


def expected(name, behaviour=None):
    """Mean loss, mean value, and gradient over all tokens, by their chances under whoever draws them."""
    student, reference = draw_logits(2, n=1, vocabulary=VOCABULARY, scale=1.0)
    student.requires_grad_()
    p, p_0 = student.log_softmax(-1), reference.log_softmax(-1)
    drawn = (p.detach() if behaviour is None else behaviour)[0]
    rows = [each.expand(VOCABULARY, VOCABULARY) for each in (p, p_0)]
    seen = make_evidence(torch.arange(VOCABULARY), rows[0], None, rows[1], behaviour=drawn)
    found = EstimatedReferenceKL(0.7, name)(seen)
    (gradient,) = torch.autograd.grad((drawn.exp() * found.loss).sum(), student, retain_graph=True)
    exact = ReferenceKL(0.7)(make_evidence(torch.zeros(1, dtype=torch.long), p, None, p_0))
    (slope,) = torch.autograd.grad(exact.loss.sum(), student)
    return (drawn.exp() * found.value).sum(), gradient, exact.value.sum(), slope


@each
def test_expected_gradient_is_that_of_the_exact_divergence(name):
    _, gradient, _, slope = expected(name)
    assert slope.abs().max() > 1e-2
    torch.testing.assert_close(gradient, slope)


@each
def test_expected_gradient_is_right_for_tokens_that_somebody_else_drew(name):
    """By the importance ratio."""
    other = draw_logits(5, n=1, vocabulary=VOCABULARY, scale=0.5)[0].log_softmax(-1)
    _, gradient, _, slope = expected(name, other)
    torch.testing.assert_close(gradient, slope)


@pytest.mark.parametrize(("name", "unbiased"), [("k2", False), ("k3pp", True), ("k4", True)])
def test_value_is_unbiased_or_not(name, unbiased):
    value, _, exact, _ = expected(name)
    assert (abs(value.item() - exact.item()) < 1e-9) == unbiased


@pytest.mark.parametrize(("name", "reason"), [("k1", "mean is zero"), ("k3", "gradient of the forward KL")])
def test_estimators_with_another_gradient_are_refused_with_the_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        EstimatedReferenceKL(estimator=name)


def test_estimator_of_the_forward_divergence_is_refused():
    with pytest.raises(ValueError, match=r"got 'k5'.*ReferenceForwardKL"):
        EstimatedReferenceKL(estimator="k5")


def test_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="got 'k6'"):
        EstimatedReferenceKL(estimator="k6")


def test_looks_at_each_position_by_itself_and_at_one_number_of_the_reference():
    assert EstimatedReferenceKL.support == "sampled"
    assert EstimatedReferenceKL.positionwise
    assert EstimatedReferenceKL.needs_reference
    assert not EstimatedReferenceKL.needs_teacher

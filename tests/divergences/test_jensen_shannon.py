import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import AUTHORS, MINUS_INFINITY, assert_same, draw_logits, each_check, outcomes, see
from stable_opd import ForwardKL, JensenShannon, ReverseKL
from stable_opd.divergences import jensen_shannon

each_beta = pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.9])


@each_check
@each_beta
def test_contract(check, beta):
    check(JensenShannon(beta))


def entropy(beta):
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


def test_known_value():
    """p = (1, 0) and q = (1/2, 1/2): m = (3/4, 1/4), and 1/2 KL(q || m) + 1/2 KL(p || m) is worked out by hand."""
    student, teacher = torch.tensor([[1.0, 0.0]]).log(), torch.tensor([[0.5, 0.5]]).log()
    of_teacher = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    expected = 0.5 * of_teacher + 0.5 * math.log(1 / 0.75)
    assert jensen_shannon(student, teacher, 0.5).item() == pytest.approx(expected, abs=1e-7)


@each_beta
def test_equals_torch_distributions_where_the_student_wrote(beta):
    """The mixture is one of probabilities, weighted by beta on the side of the teacher."""
    student, teacher = draw_logits()
    student.requires_grad_()
    p, q = Categorical(logits=student), Categorical(logits=teacher)
    m = Categorical(probs=beta * q.probs + (1 - beta) * p.probs)
    expected = beta * kl_divergence(q, m) + (1 - beta) * kl_divergence(p, m)
    term = JensenShannon(beta)(see(student, teacher, AUTHORS))
    torch.testing.assert_close(term.loss, expected)
    torch.testing.assert_close(term.value, expected.detach())
    assert term.loss.requires_grad
    assert not term.value.requires_grad
    assert term.where.tolist() == (AUTHORS == 0).tolist()


@each_beta
def test_positive_unless_equal(beta):
    student, teacher = draw_logits()
    assert (JensenShannon(beta)(see(student, teacher)).loss > 1e-3).all()


@each_beta
def test_bounded_by_the_entropy_of_the_weights_which_distinct_supports_reach(beta):
    student, teacher = draw_logits(scale=40.0)
    assert (JensenShannon(beta)(see(student, teacher)).loss <= entropy(beta) + 1e-12).all()
    disjoint = torch.tensor([[0.0, MINUS_INFINITY]]), torch.tensor([[MINUS_INFINITY, 0.0]])
    assert jensen_shannon(*disjoint, beta).item() == pytest.approx(entropy(beta), rel=1e-6)


def test_symmetric_at_one_half_alone():
    student, teacher = draw_logits().log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(student, teacher, 0.5), jensen_shannon(teacher, student, 0.5))
    torch.testing.assert_close(jensen_shannon(student, teacher, 0.2), jensen_shannon(teacher, student, 0.8))
    one_way, other_way = jensen_shannon(student, teacher, 0.2), jensen_shannon(teacher, student, 0.2)
    assert ((one_way - other_way).abs() > 1e-3).all()


def test_tends_to_both_kl_divergences_with_their_gradients():
    """Divided by the smaller weight; what is left is of its order."""
    student, teacher = draw_logits(scale=1.0)
    small = 1e-6
    for beta, limit in ((small, ForwardKL()), (1 - small, ReverseKL())):
        found = [
            (term._replace(value=term.value / small), gradient / small)
            for term, gradient in outcomes(JensenShannon(beta), student, teacher)
        ]
        assert_same(found, outcomes(limit, student, teacher), rtol=1e-3, atol=1e-4)


def test_any_leading_shape():
    student, teacher = draw_logits(n=12).log_softmax(-1)
    shaped = jensen_shannon(student.view(3, 4, 9), teacher.view(3, 4, 9), 0.3)
    torch.testing.assert_close(shaped, jensen_shannon(student, teacher, 0.3).view(3, 4))


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_weight_outside_of_its_interval_is_refused_with_the_way_out(beta):
    with pytest.raises(ValueError, match=rf"above 0 and below 1, but got {beta}. Use ForwardKL .* and ReverseKL"):
        JensenShannon(beta)

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from divergences.common import assert_same, draw_logits, each_check, likeliest, outcomes
from helpers import closed_form, make_evidence
from stable_opd import ReverseKL
from stable_opd.divergences.head_tail import HeadTailKL, head_tail_kl

V = 7
each_k = pytest.mark.parametrize("k", [0, 1, 3, V, 20])
each_behaviour = pytest.mark.parametrize("stale", [False, True], ids=["on policy", "another behaviour"])


@each_check
@pytest.mark.parametrize("k", [0, 3, 32])
def test_contract(check, k):
    check(HeadTailKL(k))


def every_draw(k, student, teacher, behaviour):
    """Loss, value and gradient for each token that may be written at one position, (V,), (V,) and (V, V), both ways.

    Args are the logits of student and teacher and the log-probs of whoever draws, each (V,).
    """
    count = len(student)

    def see(logits):
        p, q = logits.log_softmax(-1), teacher.log_softmax(-1).expand(count, count)
        return make_evidence(torch.arange(count), p, q, behaviour=behaviour)

    rows = student.expand(count, count).clone().requires_grad_()
    by_autograd = HeadTailKL(k)(see(rows))
    (slope,) = torch.autograd.grad(by_autograd.loss.sum(), rows)
    with torch.no_grad():
        closed, gradient = closed_form(HeadTailKL(k), see(rows))
    return (by_autograd.loss.detach(), by_autograd.value, slope), (closed.loss, closed.value, gradient)


def one_position(stale=False, seed=0):
    student, teacher = draw_logits(seed, n=1, vocabulary=V, scale=1.5)[:, 0]
    other = draw_logits(seed + 1, n=1, vocabulary=V, scale=1.0)[0, 0]
    return student, teacher, (other if stale else student).log_softmax(-1)


def exact(student, teacher):
    """KL(p || q) and its gradient in the logits, by torch.distributions and autograd."""
    logits = student.clone().requires_grad_()
    divergence = kl_divergence(Categorical(logits=logits), Categorical(logits=teacher))
    return divergence.detach(), torch.autograd.grad(divergence, logits)[0]


@each_k
@each_behaviour
@pytest.mark.parametrize("seed", range(3))
def test_unbiased_in_loss_value_and_gradient_by_exact_enumeration(k, stale, seed):
    student, teacher, behaviour = one_position(stale, seed)
    divergence, slope = exact(student, teacher)
    mu = behaviour.exp()
    for loss, value, gradient in every_draw(k, student, teacher, behaviour):
        torch.testing.assert_close((mu * loss).sum(), divergence)
        torch.testing.assert_close((mu * value).sum(), divergence)
        torch.testing.assert_close(mu @ gradient, slope)


@each_behaviour
@pytest.mark.parametrize("k", [V, 20])
def test_all_tokens_are_exact_draw_by_draw(k, stale):
    student, teacher, behaviour = one_position(stale)
    divergence, slope = exact(student, teacher)
    for loss, value, gradient in every_draw(k, student, teacher, behaviour):
        torch.testing.assert_close(loss, divergence.expand(V))
        torch.testing.assert_close(value, divergence.expand(V))
        torch.testing.assert_close(gradient, slope.expand(V, V))
    logits = draw_logits()
    assert_same(outcomes(HeadTailKL(9), *logits), outcomes(ReverseKL(), *logits))


@each_behaviour
def test_no_tokens_are_the_sampled_estimate(stale):
    """rho (log p - log q) with the gradient rho (log p - log q) grad log p, for each token that may be drawn."""
    student, teacher, behaviour = one_position(stale)
    p, gap = student.softmax(-1), student.log_softmax(-1) - teacher.log_softmax(-1)
    ratio = p / behaviour.exp()
    score = torch.eye(V, dtype=torch.float64) - p
    for _, value, gradient in every_draw(0, student, teacher, behaviour):
        torch.testing.assert_close(value, ratio * gap)
        torch.testing.assert_close(gradient, (ratio * gap)[:, None] * score)


def test_only_the_tail_depends_on_the_draw_and_on_who_drew():
    student, teacher, behaviour = one_position()
    _, _, other = one_position(stale=True)
    inside = likeliest(student[None], 3)[0]
    assert inside.sum() == 3
    for here, there in zip(
        every_draw(3, student, teacher, behaviour), every_draw(3, student, teacher, other), strict=True
    ):
        for found, expected in zip(here, there, strict=True):
            torch.testing.assert_close(found[inside], expected[inside])
            torch.testing.assert_close(found[inside], found[inside][:1].expand_as(found[inside]))
            assert ((found - expected)[~inside].abs().flatten(1 if found.ndim == 2 else 0) > 1e-6).any()


@each_k
def test_value_and_gradient_vanish_draw_by_draw_where_both_agree(k):
    """Differentiating the log-ratios would leave what vanishes on average alone."""
    student, _, behaviour = one_position(stale=True)
    for _, value, gradient in every_draw(k, student, student, behaviour):
        assert value.abs().max() == 0
        assert gradient.abs().max() < 1e-15


def test_number_of_the_loss_differs_from_the_value_by_what_is_nothing_on_average():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4), S the first token and the second one drawn from (1/2, 1/2, 0)."""
    log2 = torch.tensor(2.0).log().item()
    head, gap, ratio, tail_gap = (torch.tensor(each) for each in ([[0.5]], [[log2]], [0.5], [-log2]))
    loss, value = head_tail_kl(head, gap, ratio, tail_gap)
    assert value.abs().item() < 1e-7
    assert loss.item() == pytest.approx(1 - 0.5 - 0.5, abs=1e-7)
    assert head_tail_kl(head, gap, 0 * ratio, tail_gap)[0].item() == pytest.approx(0.5 * log2 + 0.5)


def test_sampler_that_never_draws_a_part_of_the_tail_leaves_a_bias():
    student, teacher, _ = one_position()
    divergence, _ = exact(student, teacher)
    mu = student.softmax(-1) * (student > student.median())
    behaviour = (mu / mu.sum()).log().nan_to_num(neginf=-50.0)
    (_, value, _), _ = every_draw(0, student, teacher, behaviour)
    assert ((mu / mu.sum() * value).sum() - divergence).abs() > 0.01


def test_tokens_that_the_student_rules_out_add_nothing():
    student = torch.tensor([[0.5, 0.5, 0.0]]).log().requires_grad_()
    teacher = torch.tensor([[0.25, 0.5, 0.25]]).log()
    found = HeadTailKL(3)(make_evidence(torch.tensor([0]), student, teacher))
    assert found.value.item() == pytest.approx(0.5 * torch.tensor(2.0).log().item())
    assert torch.autograd.grad(found.loss.sum(), student)[0].isfinite().all()


def test_fewer_than_no_tokens_are_refused():
    with pytest.raises(ValueError, match=r"Expected k of at least 0, but got -1. Use 0 for the sampled estimate"):
        HeadTailKL(-1)

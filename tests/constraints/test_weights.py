import copy

import pytest
import torch
from torch import nn

from constraints.common import _Fixed, draw_logits, see
from helpers import tiny_model
from stable_opd import Linear
from stable_opd.constraints import InitialWeights
from stable_opd.constraints.weights import pull_to


@pytest.fixture
def pair():
    """A student that has moved, one layer of which is frozen, and its reference."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    student = copy.deepcopy(reference)
    for parameter in student.parameters():
        parameter.data += torch.randn_like(parameter)
    student[1].requires_grad_(False)
    return student, reference.requires_grad_(False)


def by_autograd(student, reference):
    """Half the squared distance over what is trained, and its gradients."""
    ours = [each for each in student.parameters() if each.requires_grad]
    theirs = [b for a, b in zip(student.parameters(), reference.parameters(), strict=True) if a.requires_grad]
    value = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True)) / 2
    return value, torch.autograd.grad(value, ours)


@pytest.mark.parametrize("before", [False, True], ids=["no gradient yet", "with gradients"])
def test_pull_adds_the_gradient_of_the_weighted_penalty(before, pair):
    student, reference = pair
    value, gradients = by_autograd(student, reference)
    trained = [each for each in student.parameters() if each.requires_grad]
    for each in trained:
        each.grad = torch.ones_like(each) if before else None
    loss, found = InitialWeights(0.3).pull(student, reference, 0.0)
    assert loss.item() == pytest.approx(0.3 * found.item())
    assert found.item() == pytest.approx(value.item())
    assert not found.requires_grad
    for each, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(each.grad, 0.3 * gradient + before)
    assert all(each.grad is None for each in student[1].parameters())
    assert all(each.grad is None for each in reference.parameters())


def test_student_that_has_not_moved_is_not_pulled(pair):
    _, reference = pair
    student = copy.deepcopy(reference).requires_grad_()
    assert InitialWeights(0.3).pull(student, reference, 0.0)[1].item() == 0
    assert all(each.grad.abs().max() == 0 for each in student.parameters())


def test_weights_of_neither_model_change(pair):
    student, reference = pair
    before = copy.deepcopy((student.state_dict(), reference.state_dict()))
    InitialWeights(0.3).pull(student, reference, 0.0)
    for model, state in zip(pair, before, strict=True):
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, state[name], rtol=0, atol=0)


def test_descent_returns_to_the_reference(pair):
    """Every step takes the same share of the way: theta - theta_0 shrinks by 1 - rate * weight."""
    student, reference = pair
    optimizer = torch.optim.SGD([each for each in student.parameters() if each.requires_grad], lr=0.5)
    first = pull_to(student, reference, 0.0).item()
    assert all(each.grad is None for each in student.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        InitialWeights(0.4).pull(student, reference, 0.0)
        optimizer.step()
    assert pull_to(student, reference, 0.0).item() == pytest.approx(first * 0.8**8)


def test_reference_in_another_precision_is_compared_in_that_of_the_student(pair):
    student, reference = pair
    expected = InitialWeights(0.0).pull(student, reference, 0.0)[1].item()
    assert InitialWeights(0.3).pull(student.float(), reference, 0.0)[1].item() == pytest.approx(expected, rel=1e-6)
    assert all(each.grad.dtype == torch.float32 for each in student.parameters() if each.requires_grad)


def test_schedule_and_controller_scale_the_gradient_and_not_the_value(pair):
    student, reference = pair
    term = InitialWeights(0.8, Linear(1.0, 0.0), _Fixed(0.5))
    plain, plain_student = InitialWeights(0.3), copy.deepcopy(student)
    assert term.pull(student, reference, 0.25)[1].item() == plain.pull(plain_student, reference, 0.0)[1].item()
    for ours, theirs in zip(student.parameters(), plain_student.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_tied_weights_count_once():
    """As they are one parameter, of which there is one gradient."""
    reference = tiny_model(1)
    student = copy.deepcopy(reference)
    student.lm_head.weight.data += 0.5
    assert student.model.embed_tokens.weight is student.lm_head.weight
    _, value = InitialWeights(1.0).pull(student, reference, 0.0)
    assert value.item() == pytest.approx(0.125 * student.lm_head.weight.numel(), rel=1e-4)
    assert student.lm_head.weight.grad.mean().item() == pytest.approx(0.5, rel=1e-4)


def test_speaks_about_no_token():
    logits, _ = draw_logits()
    found = InitialWeights()(see(logits))
    assert not found.where.any()
    assert found.loss.abs().max() == found.value.abs().max() == 0
    assert len(found.loss) == 6


def test_models_that_differ_are_refused(pair):
    student, _ = pair
    with pytest.raises(ValueError, match="zip"):
        InitialWeights().pull(student, nn.Sequential(nn.Linear(3, 4)), 0.0)


def test_missing_reference_is_refused_with_a_way_out(pair):
    with pytest.raises(ValueError, match=r"initial student, but got None.*Trainer"):
        InitialWeights().pull(pair[0], None, 0.0)


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_weight_below_zero_is_refused(weight):
    with pytest.raises(ValueError, match="weight of at least 0"):
        InitialWeights(weight)

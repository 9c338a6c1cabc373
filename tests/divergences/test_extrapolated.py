import math

import pytest
import torch

from helpers import make_evidence
from stable_opd.divergences.baselines import ExactBaseline
from stable_opd.divergences.extrapolated import ExtrapolatedTeacher
from stable_opd.divergences.sampled import SampledReverseKL


def draw(seed=0, words=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, words, generator=generator, dtype=torch.float64).log_softmax(-1)


def test_by_hand():
    student, teacher, reference = torch.tensor([[-1.0, -2.0], [-0.5, -3.0], [-2.5, -1.0]])
    found = ExtrapolatedTeacher(1.5).advantage(student, teacher, reference)
    torch.testing.assert_close(found, torch.tensor([0.5 + 0.5 * 2.0, -1.0 + 0.5 * -2.0]))


def test_a_factor_of_1_is_the_teacher_and_needs_no_reference():
    student, teacher, _ = draw()
    term = ExtrapolatedTeacher(1.0)
    assert not term.needs_reference
    assert ExtrapolatedTeacher().needs_reference
    evidence = make_evidence(torch.arange(6), *(each.expand(6, 6) for each in (student, teacher)), behaviour=student)
    expected = SampledReverseKL()(evidence)
    found = term(evidence)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.value, expected.value)


def test_advantage_is_that_of_the_normalised_target_up_to_a_constant():
    student, teacher, reference = draw()
    target = (1.4 * teacher - 0.4 * reference).log_softmax(-1)
    difference = ExtrapolatedTeacher(1.4).advantage(student, teacher, reference) - (target - student)
    torch.testing.assert_close(difference, difference[0].expand(6))


def test_student_that_has_reached_the_target_gets_no_gradient_in_the_mean_and_none_at_all_with_a_baseline():
    _, teacher, reference = draw()
    logits = (1.25 * teacher - 0.25 * reference).requires_grad_()
    models = [each.expand(6, 6) for each in (logits.log_softmax(-1), teacher, reference)]
    evidence = make_evidence(torch.arange(6), *models, behaviour=models[0][0].detach())
    plain, centred = (
        term(evidence).loss for term in (ExtrapolatedTeacher(), ExtrapolatedTeacher(baseline=ExactBaseline()))
    )
    weighted = (models[0][0].detach().exp() * plain).sum()
    assert torch.autograd.grad(weighted, logits, retain_graph=True)[0].abs().max() < 1e-12
    assert plain.abs().max() > 0.01
    assert centred.abs().max() < 1e-12


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_factor_that_is_not_positive_is_refused(factor):
    with pytest.raises(ValueError, match=rf"factor above 0, but got {factor}\. .*ReferenceKL"):
        ExtrapolatedTeacher(factor)

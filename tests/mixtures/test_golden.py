from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers import make_evidence
from stable_opd import Author, GoldenMixture, Linear, Prompts, Scores
from stable_opd.mixtures import ShapedGolden


def prompts(*golden):
    count = len(golden)
    return Prompts([[1]] * count, golden, [10 + number for number in range(count)], [{}] * count)


@pytest.mark.parametrize("samples", [0, 1, 3])
def test_plans_one_golden_row_for_each_prompt_after_the_students(samples):
    plan = GoldenMixture().plan(prompts([4], [5]), samples, 0.0, 0)
    assert plan.prompt == [0] * samples + [1] * samples + [0, 1]
    assert plan.author == [Author.STUDENT] * (2 * samples) + [Author.GOLDEN] * 2


@pytest.mark.parametrize("golden", [None, []], ids=["none", "empty"])
def test_prompt_without_a_golden_solution_is_refused_by_its_number(golden):
    with pytest.raises(ValueError, match=r"1 of 3 .*first is example 11.*data\.columns\.golden.*StudentOnly"):
        GoldenMixture().plan(prompts([4], golden, [5]), 2, 0.0, 0)


def test_loss_is_the_weighted_cross_entropy_and_the_value_is_unweighted():
    logits = torch.randn(5, 8, requires_grad=True)
    tokens = torch.tensor([1, 3, 5, 7, 0])
    term = GoldenMixture(weight=0.4)(make_evidence(tokens, logits.log_softmax(-1), author=Author.GOLDEN))
    expected = F.cross_entropy(logits, tokens, reduction="none")
    torch.testing.assert_close(term.loss, 0.4 * expected)
    torch.testing.assert_close(term.value, expected.detach())
    (gradient,) = torch.autograd.grad(term.loss.sum(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, 0.4 * (logits.softmax(-1) - F.one_hot(tokens, 8)).detach())
    assert not term.value.requires_grad


def test_schedule_multiplies_the_weight_and_not_the_value():
    evidence = make_evidence(torch.tensor([1]), torch.full((1, 4), 0.25).log(), author=Author.GOLDEN, progress=0.75)
    term = GoldenMixture(2.0, Linear(1.0, 0.0))(evidence)
    assert term.loss.item() == pytest.approx(0.5 * torch.tensor(4.0).log().item())
    assert term.value.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_speaks_about_golden_tokens_only():
    logprobs = torch.randn(3, 5).log_softmax(-1)
    term = GoldenMixture()(make_evidence(torch.tensor([0, 1, 2]), logprobs, author=torch.tensor([0, 1, 2])))
    assert term.where.tolist() == [False, True, False]


GAMMAS = [0.01, 0.1, 0.5, 3.0]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_shaped_loss_and_its_gradient_by_finite_differences(gamma):
    logits, tokens = torch.randn(6, 8, dtype=torch.float64, requires_grad=True), torch.tensor([1, 3, 5, 7, 0, 2])

    def term(logits):
        return ShapedGolden(0.4, gamma=gamma)(make_evidence(tokens, logits.log_softmax(-1), author=Author.GOLDEN))

    p = logits.detach().softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    torch.testing.assert_close(term(logits).loss.detach(), -0.4 * p / (p + gamma))
    torch.testing.assert_close(term(logits).value, -p.log())
    assert torch.autograd.gradcheck(lambda each: term(each).loss, logits)
    leaf = p.log().requires_grad_()
    seen = make_evidence(tokens, logits.detach().log_softmax(-1), author=Author.GOLDEN)
    (found,) = torch.autograd.grad(ShapedGolden(0.4, gamma=gamma)(replace(seen, student=Scores(leaf))).loss.sum(), leaf)
    torch.testing.assert_close(found, -0.4 * gamma * p / (p + gamma) ** 2)


def pull(p, gamma):
    leaf = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    evidence = make_evidence(torch.zeros(len(p), dtype=torch.long), author=Author.GOLDEN)
    return -torch.autograd.grad(ShapedGolden(gamma=gamma)(replace(evidence, student=Scores(leaf))).loss.sum(), leaf)[0]


@pytest.mark.parametrize("gamma", [0.01, 0.1, 0.5])
def test_pull_is_largest_at_gamma_and_vanishes_for_what_is_ruled_out(gamma):
    grid = torch.linspace(1e-3, 1, 1000).tolist()
    pulls = pull(grid, gamma)
    assert grid[int(pulls.argmax())] == pytest.approx(gamma, abs=1e-3)
    assert pulls.max().item() == pytest.approx(0.25, rel=1e-3)
    assert pull([1e-9], gamma).item() < 1e-6


def test_large_gamma_is_plain_importance_sampling():
    p = [0.001, 0.1, 0.9]
    torch.testing.assert_close(1e6 * pull(p, 1e6), torch.tensor(p, dtype=torch.float64), rtol=1e-5, atol=0)


def test_token_that_the_student_rules_out_leaves_the_shaped_loss_finite():
    leaf = torch.tensor([-500.0, 0.0], requires_grad=True)
    evidence = make_evidence(torch.zeros(2, dtype=torch.long), author=Author.GOLDEN)
    term = ShapedGolden()(replace(evidence, student=Scores(leaf)))
    assert torch.autograd.grad(term.loss.sum(), leaf)[0].isfinite().all()


def test_shaped_golden_plans_and_speaks_like_golden():
    assert ShapedGolden().plan(prompts([4], [5]), 2, 0.0, 0) == GoldenMixture().plan(prompts([4], [5]), 2, 0.0, 0)
    logprobs = torch.randn(4, 5).log_softmax(-1)
    term = ShapedGolden()(make_evidence(torch.tensor([0, 1, 2, 3]), logprobs, author=torch.tensor([0, 1, 2, 3])))
    assert term.where.tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match=r"ShapedGolden needs .*StudentOnly"):
        ShapedGolden().plan(prompts([4], None), 2, 0.0, 0)


def test_schedule_multiplies_the_shaped_loss():
    evidence = make_evidence(torch.tensor([1]), torch.full((1, 4), 0.25).log(), author=Author.GOLDEN, progress=0.75)
    term = ShapedGolden(2.0, Linear(1.0, 0.0), 0.25)(evidence)
    assert term.loss.item() == pytest.approx(-0.25)
    assert term.value.item() == pytest.approx(torch.tensor(4.0).log().item())


@pytest.mark.parametrize(
    ("options", "message"), [({"gamma": 0.0}, "gamma above 0"), ({"weight": -1.0}, "weight of at")]
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShapedGolden(**options)

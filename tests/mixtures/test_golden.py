import pytest
import torch
import torch.nn.functional as F

from helpers import make_evidence
from stable_opd import Author, GoldenMixture, Linear, Prompts


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

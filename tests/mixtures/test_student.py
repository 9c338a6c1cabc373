import torch

from helpers import make_evidence
from stable_opd import Author, Prompts, StudentOnly

PROMPTS = Prompts([[1], [2], [3]], [None, [4], None], [0, 1, 2], [{}] * 3)


def test_plans_the_students_rows_with_those_of_a_prompt_together():
    plan = StudentOnly().plan(PROMPTS, 2, 0.0, 0)
    assert plan.prompt == [0, 0, 1, 1, 2, 2]
    assert plan.author == [Author.STUDENT] * 6


def test_speaks_about_no_position():
    logprobs = torch.randn(3, 5).log_softmax(-1)
    term = StudentOnly()(make_evidence(torch.tensor([0, 1, 2]), logprobs, author=torch.tensor([0, 1, 2])))
    assert not term.where.any()
    assert term.loss.tolist() == term.value.tolist() == [0.0] * 3

import pytest
import torch

from helpers import TOKENIZER, make_rollout
from stable_opd import ExactMatch, Finish, PeriodicSuffix, Prompts
from stable_opd.evaluation import Evaluation, grades, records, repeated_from

FIELDS = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}, {"answer": "4"}]


def prompts(task):
    return Prompts([[1]] * 4, [None] * 4, [0, 1, 2, 3], FIELDS, task)


def answers():
    return make_rollout(
        [[1, 7], [5] * 9, [3, 3], [1, 2, 3]],
        finish=[Finish.STOP, Finish.LENGTH, Finish.STOP, Finish.LOOP],
        texts=["1", "5 5 5", "3", "no"],
    )


def test_each_row_is_graded_with_the_fields_of_its_prompt():
    assert grades(prompts(ExactMatch(marker="")), answers()) == [1.0, 0.0, 1.0, 0.0]
    turned = answers().select(torch.tensor([2, 0]))
    assert grades(prompts(ExactMatch(marker="")), turned) == [1.0, 1.0]


def test_without_a_task_there_are_no_grades_and_no_accuracy():
    assert grades(prompts(None), answers()) == []
    evaluation = Evaluation(10, 0.6)
    for _, metrics in evaluation.sets():
        evaluation.measure(metrics, prompts(None), answers(), PeriodicSuffix(4, 3, 3))
    assert not any("accuracy" in name for name in evaluation.compute())


def test_figures_of_both_sets_over_all_batches_by_hand():
    evaluation = Evaluation(10, 0.6)
    greedy, sampled = (metrics for _, metrics in evaluation.sets())
    task, detector = prompts(ExactMatch(marker="")), PeriodicSuffix(4, 3, 3)
    evaluation.measure(greedy, task, answers(), detector)
    evaluation.measure(greedy, task, answers().select(torch.tensor([0])), detector)
    evaluation.measure(sampled, task, answers().select(torch.tensor([1])), detector)
    figures = {name: value.item() for name, value in evaluation.compute().items()}
    assert figures == pytest.approx(
        {
            "accuracy": 3 / 5,
            "truncation_rate": 2 / 5,
            "repetition_rate": 1 / 5,
            "length_mean": 18 / 5,
            "length_p95": 9,
            "length_max": 9,
            "sampled/accuracy": 0,
            "sampled/truncation_rate": 1,
            "sampled/repetition_rate": 1,
            "sampled/length_mean": 9,
            "sampled/length_p95": 9,
            "sampled/length_max": 9,
        }
    )


def test_figures_are_forgotten_once_they_are_told():
    evaluation = Evaluation(10, 0.6)
    (_, greedy), _ = evaluation.sets()
    detector = PeriodicSuffix(4, 3, 3)
    evaluation.measure(greedy, prompts(ExactMatch(marker="")), answers(), detector)
    evaluation.compute()
    evaluation.measure(greedy, prompts(ExactMatch(marker="")), answers().select(torch.tensor([0])), detector)
    assert evaluation.compute()["accuracy"] == 1.0


def test_first_set_is_greedy_and_the_second_is_drawn_at_the_temperature():
    first, second = (sampler for sampler, _ in Evaluation(10, 0.25).sets())
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    prefix = torch.zeros(1, 0, dtype=torch.long)
    assert first(logits, prefix).isfinite().tolist() == [[False, True, False]]
    torch.testing.assert_close(second(logits, prefix), 4 * logits)


def test_records_say_where_an_answer_begins_to_repeat_itself():
    rollout, task = answers(), prompts(ExactMatch(marker=""))
    found = PeriodicSuffix(4, 3, 3)(rollout)
    places = repeated_from(rollout, found, TOKENIZER)
    # Nine times the same token: the second copy is where it begins.
    assert places == [None, len(TOKENIZER.decode([5])), None, None]
    written = records(task, rollout, found, grades(task, rollout), TOKENIZER)
    assert [record["repeated_from"] for record in written] == places
    assert [record["grade"] for record in written] == [1.0, 0.0, 1.0, 0.0]
    assert "grade" not in records(prompts(None), rollout, found, [], TOKENIZER)[0]

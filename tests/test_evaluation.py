import pytest
import torch

from helpers import TOKENIZER, make_rollout
from stable_opd import ExactMatch, Finish, PeriodicSuffix, Prompts
from stable_opd.evaluation import Evaluation, grades, means, records, repeated_from
from stable_opd.options import EvaluationOptions

FIELDS = [{"answer": "1"}, {"answer": "2"}, {"answer": "3"}, {"answer": "4"}]


DETECTOR = PeriodicSuffix(4, 3, 3)


def prompts(task, **options):
    evaluation = EvaluationOptions(**options) if options else None
    return Prompts([[1]] * 4, [None] * 4, [0, 1, 2, 3], FIELDS, task, evaluation)


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
    for each in evaluation.sets(prompts(None)):
        evaluation.measure(each, prompts(None), answers(), DETECTOR)
    assert not any("accuracy" in name or "pass" in name for name in evaluation.compute())


def numbers(evaluation):
    return {name: value.item() for name, value in evaluation.compute().items()}


def test_figures_of_both_sets_over_all_batches_by_hand():
    evaluation = Evaluation(10, 0.6)
    task = prompts(ExactMatch(marker=""))
    greedy, sampled = evaluation.sets(task)
    evaluation.measure(greedy, task, answers(), DETECTOR)
    evaluation.measure(greedy, task, answers().select(torch.tensor([0])), DETECTOR)
    evaluation.measure(sampled, task, answers().select(torch.tensor([1])), DETECTOR)
    assert numbers(evaluation) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "finished_accuracy": 3 / 5,
            "truncation_rate": 2 / 5,
            "repetition_rate": 1 / 5,
            "length_mean": 18 / 5,
            "length_p95": 9,
            "length_max": 9,
            "sampled/accuracy": 0,
            "sampled/finished_accuracy": 0,
            "sampled/truncation_rate": 1,
            "sampled/repetition_rate": 1,
            "sampled/length_mean": 9,
            "sampled/length_p95": 9,
            "sampled/length_max": 9,
        }
    )


def test_an_answer_that_was_cut_is_wrong_even_if_it_holds_the_right_one():
    evaluation, task = Evaluation(10, 0.6), prompts(ExactMatch(marker=""))
    right = answers()
    right.texts[1] = "2"  # which ran out of its budget
    evaluation.measure(evaluation.sets(task)[0], task, right, DETECTOR)
    figures = numbers(evaluation)
    assert (figures["accuracy"], figures["finished_accuracy"]) == (3 / 4, 2 / 4)


def test_figures_are_forgotten_once_they_are_told():
    evaluation, task = Evaluation(10, 0.6), prompts(ExactMatch(marker=""))
    greedy, _ = evaluation.sets(task)
    evaluation.measure(greedy, task, answers(), DETECTOR)
    evaluation.compute()
    evaluation.measure(greedy, task, answers().select(torch.tensor([0])), DETECTOR)
    assert evaluation.compute()["accuracy"] == 1.0
    assert evaluation.compute() == {}


@pytest.mark.parametrize(("options", "scale"), [({}, 4), ({"temperature": 0.5}, 2), ({"name": "aime"}, 4)])
def test_first_answers_are_greedy_and_the_others_drawn_at_the_temperature(options, scale):
    first, second = (each.sampler for each in Evaluation(10, 0.25).sets(prompts(None, **options)))
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    prefix = torch.zeros(1, 0, dtype=torch.long)
    assert first(logits, prefix).isfinite().tolist() == [[False, True, False]]
    torch.testing.assert_close(second(logits, prefix), scale * logits)


def test_no_samples_leave_the_greedy_answers_alone():
    assert [each.kind for each in Evaluation(10, 0.25).sets(prompts(None, samples=0))] == [""]


def test_several_samples_give_their_mean_and_what_one_of_k_reaches():
    """Two prompts with two answers each: one has a right answer, the other none."""
    evaluation = Evaluation(10, 0.6)
    task = Prompts([[1]] * 2, [None] * 2, [0, 1], [{"answer": "1"}, {"answer": "2"}], ExactMatch(marker=""))
    task.evaluation = EvaluationOptions(samples=2)
    _, sampled = evaluation.sets(task)
    rollout = make_rollout([[1, 7]] * 4, finish=[Finish.STOP] * 4, texts=["1", "5", "5", "5"])
    rollout.prompt[:] = torch.tensor([0, 0, 1, 1])
    evaluation.measure(sampled, task, rollout, DETECTOR)
    figures = numbers(evaluation)
    assert (figures["sampled/accuracy"], figures["sampled/pass_at_2"]) == (1 / 4, 1 / 2)


def test_sets_with_names_are_told_apart_and_averaged():
    evaluation = Evaluation(10, 0.6)
    for name, rows in (("easy", [0, 2]), ("hard", [1, 3])):
        task = prompts(ExactMatch(marker=""), name=name, samples=0)
        (greedy,) = evaluation.sets(task)
        evaluation.measure(greedy, task, answers().select(torch.tensor(rows)), DETECTOR)
    figures = numbers(evaluation)
    assert (figures["easy/accuracy"], figures["hard/accuracy"], figures["accuracy"]) == (1.0, 0.0, 0.5)
    assert (figures["easy/length_mean"], figures["hard/length_mean"], figures["length_mean"]) == (2, 6, 4)
    assert (figures["easy/length_max"], figures["hard/length_max"], figures["length_max"]) == (2, 9, 9)


def test_a_mean_over_sets_needs_the_figure_of_all_of_them():
    assert means([{"a": torch.tensor(1.0), "b": torch.tensor(1.0)}, {"a": torch.tensor(2.0)}]) == {"a": 1.5}
    assert means([]) == {}


def test_records_say_where_an_answer_begins_to_repeat_itself():
    rollout, task = answers(), prompts(ExactMatch(marker=""))
    found = DETECTOR(rollout)
    places = repeated_from(rollout, found, TOKENIZER)
    # Nine times the same token: the second copy is where it begins.
    assert places == [None, len(TOKENIZER.decode([5])), None, None]
    written = records(task, rollout, found, grades(task, rollout), TOKENIZER)
    assert [record["repeated_from"] for record in written] == places
    assert [record["grade"] for record in written] == [1.0, 0.0, 1.0, 0.0]
    assert "grade" not in records(prompts(None), rollout, found, [], TOKENIZER)[0]
    assert "set" not in written[0]


def test_records_name_their_set():
    rollout, task = answers(), prompts(None, name="aime24")
    written = records(task, rollout, DETECTOR(rollout), [], TOKENIZER)
    assert [record["set"] for record in written] == ["aime24"] * 4

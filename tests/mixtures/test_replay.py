"""Rows of earlier steps."""

import datetime
import io

import pytest
import torch

from helpers import make_rollout
from stable_opd import Author, Finish
from stable_opd.mixtures import ReplayMixture

STUDENT, GOLDEN, TEACHER, PAST = Author


def written(step, rows=4):
    """Rows whose tokens tell the step and the place, of several lengths, beside a golden one."""
    completions = [[100 * step + row] * (1 + (step + row) % 3) for row in range(rows)] + [[7]]
    return make_rollout(
        completions,
        [[1] * (1 + row % 2) for row in range(rows)] + [[2]],
        [STUDENT] * rows + [GOLDEN],
        [Finish.STOP if row % 2 else Finish.LENGTH for row in range(rows)] + [Finish.STOP],
        behaviour=-torch.arange(1.0, 1 + sum(map(len, completions))) - 100 * step,
        texts=[f"{step}.{row}" for row in range(rows)] + ["golden"],
    )


def past_of(rollout):
    return rollout.select(rollout.written_by(PAST))


def run(mixture, steps):
    return [mixture.revise(written(step), step) for step in steps]


def test_first_step_has_nothing_to_repeat():
    rollout = written(0)
    assert ReplayMixture().revise(rollout, 0) is rollout


@pytest.mark.parametrize("capacity", [6, 1000], ids=["some have to leave", "room for all"])
def test_rows_of_this_step_are_not_repeated_in_it(capacity):
    for step, rollout in enumerate(run(ReplayMixture(rate=3.0, capacity=capacity), range(5))):
        assert all(not text.startswith(f"{step}.") for text in past_of(rollout).texts)
        assert len(set(past_of(rollout).texts)) == len(past_of(rollout)) == min(12, 4 * step, capacity)


def test_rows_come_back_as_they_were_written():
    revised = run(ReplayMixture(rate=2.0), range(3))
    for rollout in revised[1:]:
        own = len(rollout) - len(past_of(rollout))
        assert rollout.author.tolist() == [STUDENT] * 4 + [GOLDEN] + [PAST] * (len(rollout) - own)
        assert rollout.prompt[own:].tolist() == [-1] * len(past_of(rollout))
        for place in range(own, len(rollout)):
            step, row = map(int, rollout.texts[place].split("."))
            found, expected = rollout.select(torch.tensor([place])), written(step).select(torch.tensor([row]))
            for name in ("tokens", "prompt_lengths", "lengths", "finish", "behaviour_logprobs"):
                assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name
            assert set(found.token_author.tolist()) == {PAST}
        before = written(int(rollout.texts[0].split(".")[0]))
        assert rollout.select(torch.arange(own)).completion.tolist() == before.completion.tolist()


def test_oldest_rows_leave_first():
    mixture = ReplayMixture(capacity=6)
    run(mixture, range(3))
    assert [row["text"] for row in mixture.rows] == ["1.2", "1.3", "2.0", "2.1", "2.2", "2.3"]


def test_only_the_students_rows_are_kept():
    mixture = ReplayMixture()
    rollout = written(0)
    mixture.revise(rollout, 0)
    assert [row["text"] for row in mixture.rows] == ["0.0", "0.1", "0.2", "0.3"]
    assert all(row["tokens"].device.type == "cpu" for row in mixture.rows)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1.5, 6), (9.0, 12)])
def test_share_says_how_many(share, count):
    assert len(past_of(run(ReplayMixture(rate=share), range(4))[-1])) == count


def test_step_without_rows_of_the_students_repeats_none():
    mixture = ReplayMixture(rate=2.0)
    run(mixture, range(2))
    others = written(2).select(torch.tensor([4]))
    assert mixture.revise(others, 2) is others
    assert len(mixture.rows) == 8


def test_choice_follows_from_the_step_and_the_seed_alone(monkeypatch):
    def chosen(step):
        mixture = ReplayMixture(rate=0.5)
        run(mixture, range(4))
        torch.rand(step)  # whatever else was drawn
        return past_of(mixture.revise(written(9), step)).texts

    first = [chosen(step) for step in range(20, 40)]
    assert [chosen(step) for step in range(20, 40)] == first
    assert len({tuple(each) for each in first}) > 10
    assert len({text for each in first for text in each}) > 12  # of 16
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert [chosen(step) for step in range(20, 40)] != first


def test_beginning_of_somebody_else_stays_his():
    """It was not drawn by the student, so no ratio corrects for it."""
    mixture = ReplayMixture(rate=1.0)
    authors = torch.tensor([1, 1, 0, 0])
    rollout = make_rollout([[4, 5, 6, 7]], behaviour=torch.tensor([0.0, 0, -1, -2]), token_authors=authors)
    mixture.revise(rollout, 0)
    past = past_of(mixture.revise(rollout, 1))
    assert past.token_author.tolist() == [GOLDEN, GOLDEN, PAST, PAST]
    assert rollout.token_author.tolist() == [GOLDEN, GOLDEN, STUDENT, STUDENT]  # what was written is left as it is


def test_checkpoint_goes_through_a_file_and_goes_on_alike():
    whole, first, second = (ReplayMixture(rate=0.5, capacity=7) for _ in range(3))
    expected = run(whole, range(6))
    run(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for found, wanted in zip(run(second, range(3, 6)), expected[3:], strict=True):
        assert found.texts == wanted.texts
        assert found.tokens.tolist() == wanted.tokens.tolist()
        assert found.behaviour_logprobs.tolist() == wanted.behaviour_logprobs.tolist()
    assert len(second.rows) == 7


def test_fields_come_back_with_their_rows_and_go_through_a_file():
    """Whatever a data set holds, a checkpoint holds what is loaded without unpickling."""
    fields = [{"subject": "a", "level": 3, "tags": ["x"]}, {"subject": "b", "day": datetime.date(2026, 1, 2)}]
    rollout, mixture = make_rollout([[4], [5]], fields=fields), ReplayMixture(rate=2.0)
    mixture.revise(rollout, 0)
    file = io.BytesIO()
    torch.save(mixture.state_dict(), file)
    file.seek(0)
    mixture.load_state_dict(torch.load(file, weights_only=True))
    revised = mixture.revise(rollout, 1)
    expected = {4: fields[0], 5: {"subject": "b", "day": "2026-01-02"}}
    assert revised.fields[:2] == fields
    assert len(revised) == 4
    assert revised.fields[2:] == [expected[token] for token in revised.completion[2:].tolist()]


@pytest.mark.parametrize(("share", "capacity"), [(-0.1, 5), (0.2, 0)])
def test_impossible_settings_are_refused(share, capacity):
    with pytest.raises(ValueError, match=rf"but got {share} and {capacity}\. .*StudentOnly"):
        ReplayMixture(rate=share, capacity=capacity)

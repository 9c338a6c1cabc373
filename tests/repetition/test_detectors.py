"""What every detector must do, whatever it looks for."""

import inspect

import pytest
import torch

from helpers import make_rollout
from stable_opd import Finish, PeriodicSuffix, build, components
from stable_opd.registry import summary

OURS = [name for name, cls in components("repetition").items() if cls.__module__.startswith("stable_opd.")]

ROWS = {
    "no rows": [],
    "one empty row": [[]],
    "empty rows": [[], [], []],
    "one token": [[7]],
    "short rows": [[1, 2, 3], [], [4], [5, 5]],
    "empty rows at both ends": [[], [5] * 700, []],
    "ragged rows": [[5] * 700, list(range(900)), [], [1, 2, 3] * 300, [8]],
}


def make(name):
    needs_parts = "detectors" in inspect.signature(components("repetition")[name]).parameters
    return build("repetition", name, detectors=[PeriodicSuffix()]) if needs_parts else build("repetition", name)


@pytest.mark.parametrize("finish", Finish, ids=lambda reason: reason.name)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", OURS)
def test_result_has_a_mark_per_token_and_a_flag_per_row(name, rows, finish):
    rollout = make_rollout(rows, finish=[finish] * len(rows))
    found = make(name)(rollout)
    assert found.in_loop.dtype == found.repetitive.dtype == torch.bool
    assert found.in_loop.shape == rollout.completion.shape
    assert found.repetitive.shape == (len(rows),)


@pytest.mark.parametrize("name", OURS)
def test_loop_is_found_and_text_is_not_in_the_same_batch(name):
    loop, text = [31, 32, 33] * 4000, list(range(12_000))
    texts = ["so it is. " * 3000, "".join(map(str, text))]
    found = make(name)(make_rollout([loop, text], texts=texts))
    assert found.repetitive.tolist() == [True, False]
    assert found.in_loop[:12_000].any()
    assert not found.in_loop[12_000:].any()


@pytest.mark.parametrize("name", OURS)
def test_rows_do_not_depend_on_each_other(name):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, (count,), generator=generator).tolist() for count in (300, 0, 40, 1)]
    rows += [rows[0] + [5] * 300, [5, 5, 6] * 250, [5, 5, 6] * 250, [*range(800)]]
    finish = [Finish.STOP, Finish.LENGTH] * 4
    together = make(name)(make_rollout(rows, finish=finish))
    alone = [make(name)(make_rollout([row], finish=[reason])) for row, reason in zip(rows, finish, strict=True)]
    assert together.in_loop.tolist() == [mark for each in alone for mark in each.in_loop.tolist()]
    assert together.repetitive.tolist() == [each.repetitive.item() for each in alone]


# ZlibRepetition looks at the text, and marks in proportion.
@pytest.mark.parametrize("name", [name for name in OURS if name != "ZlibRepetition"])
def test_stop_token_is_never_marked_by_what_looks_at_tokens(name):
    found = make(name)(make_rollout([[5] * 700, [5] * 700], finish=[Finish.STOP, Finish.LENGTH]))
    assert found.repetitive.tolist() == [True, True]
    assert [found.in_loop[699].item(), found.in_loop[1399].item()] == [False, True]


@pytest.mark.parametrize("name", OURS)
def test_prompt_is_not_part_of_the_answer(name):
    found = make(name)(make_rollout([list(range(300))], prompts=[[5] * 900]))
    assert not found.in_loop.any()


@pytest.mark.parametrize("name", OURS)
def test_summary_is_one_sentence(name):
    assert summary(components("repetition")[name]).endswith(".")


def test_parameters_of_one_name_have_one_default():
    defaults = {}
    for name in OURS:
        for parameter in inspect.signature(components("repetition")[name]).parameters.values():
            defaults.setdefault(parameter.name, set()).add(parameter.default)
    assert {name: values for name, values in defaults.items() if len(values) > 1} == {}

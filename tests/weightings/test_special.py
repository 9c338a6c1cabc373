from collections import Counter

import pytest
import torch

from helpers import make_rollout
from stable_opd import Finish
from stable_opd.weightings import SpecialTokens
from weightings.looks import draw, look_of, of_rows, part


def naive(look, tokens, first, mask_end):
    found = []
    for row, finish in zip(of_rows(look, look.rollout.completion), look.rollout.finish.tolist(), strict=True):
        seen = Counter()
        for place, token in enumerate(row):
            seen[token] += 1
            masked = token in tokens and (first is None or seen[token] <= first)
            ended = place == len(row) - 1 and finish == Finish.STOP
            found.append(float(not masked or (ended and not mask_end)))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tokens", [[2], [0, 5, 6], [99]], ids=str)
@pytest.mark.parametrize("first", [1, 2, None])
@pytest.mark.parametrize("mask_end", [False, True])
def test_special_tokens_are_masked(seed, tokens, first, mask_end):
    look, weighting = draw(seed), SpecialTokens(tokens, first, mask_end)
    weights = weighting(look)
    assert weights.tolist() == naive(look, tokens, first, mask_end)
    rows = torch.arange(len(look.rollout)).flip(0)
    assert (weighting(part(look, rows)) == weights[look.rollout.places(rows)]).all()


ROWS = [[5, 9, 5, 3], [9, 5, 5, 9]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 0, 1, 1, 0, 0, 1, 1]),
        ({"first": None}, [0, 0, 0, 1, 0, 0, 0, 1]),
        ({"first": None, "mask_end": True}, [0, 0, 0, 1, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_example_by_hand(options, expected):
    """The first row ended by a stop token that is not listed, the second by one that is."""
    rollout = make_rollout(ROWS, finish=[Finish.STOP] * 2)
    assert SpecialTokens([5, 9], **options)(look_of(rollout)).tolist() == expected


def test_first_token_of_a_row_that_is_the_stop_token_counts():
    rollout = make_rollout([[9], [9]], finish=[Finish.STOP, Finish.LENGTH])
    assert SpecialTokens([9])(look_of(rollout)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), r"Expected tokens to be some token ids, but got \[\].*convert_tokens_to_ids"),
        (([3, -1],), r"but got \[3, -1\]"),
        (([3], 0), r"Expected first of at least 1, but got 0\. Use null"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        SpecialTokens(*arguments)

import pytest
import torch

from helpers import make_evidence, make_rollout
from stable_opd import Author, Finish, Prompts, Scores

PROMPTS = [[1, 2], [3], [4, 5, 6]]
ROWS = [[10, 11, 12], [], [13]]


def rollout():
    return make_rollout(
        ROWS,
        PROMPTS,
        authors=[Author.STUDENT, Author.GOLDEN, Author.STUDENT],
        finish=[Finish.STOP, Finish.LENGTH, Finish.LOOP],
        behaviour=torch.tensor([-0.1, -0.2, -0.3, -0.4]),
        fields=[{"row": row} for row in range(3)],
    )


def test_row_and_position_of_each_completion_token_skip_an_empty_row():
    assert rollout().row.tolist() == [0, 0, 0, 2]
    assert rollout().position.tolist() == [0, 1, 2, 0]


def test_completion_leaves_the_prompts_out():
    assert rollout().completion.tolist() == [10, 11, 12, 13]


def test_starts_point_at_each_rows_prompt():
    assert rollout().starts.tolist() == [0, 5, 6]


def test_a_row_that_was_stopped_in_a_loop_counts_as_truncated():
    assert rollout().truncated.tolist() == [False, True, True]


def test_rows_by_author():
    assert rollout().written_by(Author.STUDENT).tolist() == [0, 2]
    assert rollout().written_by(Author.GOLDEN).tolist() == [1]
    assert rollout().written_by(Author.TEACHER).tolist() == []


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1], [2, 2, 0], []], ids=str)
def test_select_equals_building_the_rollout_of_those_rows(rows):
    whole = rollout()
    part = whole.select(torch.tensor(rows, dtype=torch.long))
    tokens = [token for row in rows for token in PROMPTS[row] + ROWS[row]]
    behaviour = [[-0.1, -0.2, -0.3], [], [-0.4]]
    assert part.tokens.tolist() == tokens
    assert part.completion.tolist() == [token for row in rows for token in ROWS[row]]
    assert part.prompt_lengths.tolist() == [len(PROMPTS[row]) for row in rows]
    assert part.lengths.tolist() == [len(ROWS[row]) for row in rows]
    assert part.prompt.tolist() == rows
    assert part.author.tolist() == [[0, 1, 0][row] for row in rows]
    assert part.finish.tolist() == [[0, 1, 2][row] for row in rows]
    assert part.texts == [whole.texts[row] for row in rows]
    assert part.fields == [{"row": row} for row in rows]
    torch.testing.assert_close(part.behaviour_logprobs, torch.tensor([x for row in rows for x in behaviour[row]]))


def test_select_of_a_selection_selects_once_more():
    part = rollout().select(torch.tensor([2, 0])).select(torch.tensor([1]))
    assert part.completion.tolist() == [10, 11, 12]
    assert part.row.tolist() == [0, 0, 0]


def test_rollout_and_prompts_count_rows():
    assert len(rollout()) == 3
    assert len(Prompts(PROMPTS, [None] * 3, [0, 1, 2], [{}] * 3)) == 3


@pytest.mark.parametrize(("field", "way_out"), [("sampled", "needs_teacher"), ("logprobs", 'support = "full"')])
def test_reading_scores_that_nobody_asked_for_says_what_to_declare(field, way_out):
    with pytest.raises(ValueError, match=way_out):
        getattr(Scores(), field)


def test_evidence_on_a_tile_holds_the_facts_of_that_tile():
    evidence = make_evidence(
        torch.tensor([5, 6, 7, 8]),
        author=torch.tensor([0, 0, 1, 1]),
        behaviour=torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        in_loop=torch.tensor([False, True, True, False]),
        progress=0.25,
    )
    scores = [Scores(torch.zeros(2)) for _ in range(3)]
    tile = evidence.seen(slice(1, 3), *scores)
    assert tile.tokens.tolist() == [6, 7]
    assert tile.position.tolist() == [1, 2]
    assert tile.in_loop.tolist() == [True, True]
    assert tile.behaviour_logprobs.tolist() == [-2.0, -3.0]
    assert tile.written_by(Author.GOLDEN).tolist() == [False, True]
    assert tile.progress == 0.25
    assert [tile.student, tile.teacher, tile.reference] == scores

import pytest
import torch

from helpers import EOS, TOKENIZER, tiny_model
from stable_opd import Author, Finish, Plan, Prompts, Temperature, TransformersEngine
from stable_opd.engines import Request
from stable_opd.randomness import key
from stable_opd.rollouts import Writers, row_keys

PROMPTS = Prompts(
    ids=[[12, 3, 13], [12, 1], [12, 7, 10, 2]],
    golden=[[1, 2, EOS], None, [4, 5, 6]],
    index=[40, 50, 60],
    fields=[{}] * 3,
)
PARTS = (0, 7)


def write(plan, prompts=PROMPTS, budget=6, teacher=None, blend=None):
    model = tiny_model(1)
    writers = Writers(model, TOKENIZER, TransformersEngine(), budget, [EOS], teacher)
    return model, writers.carry_out(plan, prompts, Temperature(1.0), PARTS, blend)


def mixed_plan():
    """Authors in an order that no mixture here would choose."""
    return Plan([0, 0, 1, 2, 2], [Author.GOLDEN, Author.STUDENT, Author.STUDENT, Author.STUDENT, Author.GOLDEN])


def completions(rollout):
    return [part.tolist() for part in rollout.completion.split(rollout.lengths.tolist())]


def test_rows_stand_in_the_order_of_the_plan():
    model, rollout = write(mixed_plan())
    keys = [key(*PARTS, 40, 0), key(*PARTS, 50, 0), key(*PARTS, 60, 0)]
    request = Request(PROMPTS.ids, [0, 1, 2], keys, 6, [EOS])
    written = TransformersEngine().generate(model, request, Temperature(1.0))
    own = [part.tolist() for part in written.tokens.split(written.lengths.tolist())]
    assert completions(rollout) == [[1, 2, EOS], *own, [4, 5, 6]]
    assert rollout.author.tolist() == mixed_plan().author
    assert rollout.prompt.tolist() == mixed_plan().prompt
    assert rollout.prompt_lengths.tolist() == [3, 3, 2, 4, 4]
    logprobs = rollout.behaviour_logprobs.split(rollout.lengths.tolist())
    torch.testing.assert_close(torch.cat(logprobs[1:4]), written.logprobs)
    assert torch.cat([logprobs[0], logprobs[4]]).tolist() == [0.0] * 6


def test_each_row_begins_with_its_prompt():
    _, rollout = write(mixed_plan())
    for row, prompt in enumerate(mixed_plan().prompt):
        part = rollout.select(torch.tensor([row]))
        assert part.tokens.tolist() == PROMPTS.ids[prompt] + completions(rollout)[row]


def test_golden_row_without_a_stop_token_counts_as_cut():
    _, rollout = write(mixed_plan())
    assert rollout.finish[0] == Finish.STOP
    assert rollout.finish[4] == Finish.LENGTH


def test_texts_are_the_completions_without_special_tokens():
    _, rollout = write(mixed_plan())
    assert rollout.texts[0] == "1 2"
    for text, row in zip(rollout.texts, completions(rollout), strict=True):
        assert text == " ".join(TOKENIZER.convert_ids_to_tokens([t for t in row if t < EOS]))


def test_plan_of_golden_rows_alone_needs_no_generation():
    _, rollout = write(Plan([2, 0], [Author.GOLDEN, Author.GOLDEN]))
    assert completions(rollout) == [[4, 5, 6], [1, 2, EOS]]
    assert rollout.behaviour_logprobs.tolist() == [0.0] * 6


def test_row_does_not_depend_on_where_its_prompt_stands_in_the_batch():
    """So one process and two write the same, and a resumed run what an uninterrupted one would."""
    _, forward = write(Plan([0, 0, 1, 1, 2, 2], [Author.STUDENT] * 6))
    turned = Prompts(PROMPTS.ids[::-1], PROMPTS.golden[::-1], PROMPTS.index[::-1], PROMPTS.fields)
    _, backward = write(Plan([0, 0, 1, 1, 2, 2], [Author.STUDENT] * 6), turned)
    found, expected = completions(backward), completions(forward)
    assert found == [*expected[4:], *expected[2:4], *expected[:2]]


def test_keys_come_from_parts_dataset_index_and_sample_number():
    plan = Plan([0, 0, 1, 0], [Author.STUDENT] * 4)
    expected = [key(1, "x", 40, 0), key(1, "x", 40, 1), key(1, "x", 50, 0), key(1, "x", 40, 2)]
    assert row_keys(plan, PROMPTS, [0, 1, 2, 3], 1, "x") == expected


def test_author_who_does_not_write_here_is_refused():
    with pytest.raises(ValueError, match="rows by GOLDEN, STUDENT, but got TEACHER"):
        write(Plan([0, 1], [Author.STUDENT, Author.TEACHER]))

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers import EOS, TOKENIZER, VOCABULARY, tiny_model
from stable_opd import Author, Finish, InProcessEngine, LocalTeacher, Plan, Prompts, Temperature, TransformersEngine
from stable_opd.engines import Request
from stable_opd.engines.base import Blend
from stable_opd.mixtures import mixed
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


def test_each_row_has_those_fields_of_its_prompt_that_are_asked_for():
    fields = [{"answer": "1", "subject": "a"}, {"subject": "b"}, {"answer": "3"}]
    prompts = Prompts(PROMPTS.ids, PROMPTS.golden, PROMPTS.index, fields)
    writers = Writers(tiny_model(1), TOKENIZER, TransformersEngine(), 2, [EOS], columns=("subject",))
    rollout = writers.carry_out(mixed_plan(), prompts, Temperature(1.0), PARTS)
    assert rollout.fields == [{"subject": "a"}, {"subject": "a"}, {"subject": "b"}, {}, {}]
    assert write(mixed_plan(), prompts)[1].fields == [{}] * 5


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


class _Writing(LocalTeacher):
    """A teacher in memory; it knows whether it is on the device, where only the last to leave may take it from."""

    def __init__(self, model):
        super().__init__("nowhere", offload=True)
        self._model, self.here, self.visits = model, False, 0

    @contextmanager
    def present(self):
        self.visits, self.here = self.visits + 1, True
        try:
            yield
        finally:
            self.here = False

    @property
    def language_model(self):
        assert self.here
        return self.model


def wide(**options):
    return tiny_model(2, hidden_size=48, num_attention_heads=3, num_key_value_heads=1, **options)


def rows_of(rollout):
    """Tokens, authors and log-probs of each row."""
    lengths = rollout.lengths.tolist()
    authors = [part.tolist() for part in rollout.token_author.split(lengths)]
    return list(zip(completions(rollout), authors, rollout.behaviour_logprobs.split(lengths), strict=True))


def logprobs_of(model, head, row):
    """Log-probs of a row's tokens, from a forward over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([[*head, *row]])).logits[0, len(head) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(row)), row]


def prefixed(prefix, author=Author.GOLDEN, prompt=(0, 0, 1, 2)):
    return Plan(list(prompt), [Author.STUDENT] * len(prompt), prefix, author)


def test_teachers_rows_are_drawn_from_the_teacher_at_temperature_1():
    teacher = _Writing(wide())
    plan = Plan([0, 0, 1, 2, 2], [Author.TEACHER, Author.STUDENT, Author.TEACHER, Author.TEACHER, Author.GOLDEN])
    _, rollout = write(plan, teacher=teacher)
    assert rollout.author.tolist() == plan.author
    for number in (0, 2, 3):
        row, authors, found = rows_of(rollout)[number]
        assert authors == [Author.TEACHER] * len(row)
        expected = logprobs_of(teacher.model, PROMPTS.ids[plan.prompt[number]], row)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert teacher.visits == 1


def test_teacher_that_writes_nothing_does_not_come():
    teacher = _Writing(wide())
    for plan in (mixed_plan(), prefixed(0, Author.TEACHER), prefixed(2)):
        write(plan, teacher=teacher)
    assert teacher.visits == 0


@pytest.mark.parametrize("prefix", [1, 2, 3, 5, 90])
def test_golden_prefix_is_followed_by_the_student(prefix):
    """It leaves the last token of the solution, and of the budget, to the student."""
    golden = [[1, 2, EOS], [7, 8, 9, 1, 2, 3, 4, 5, EOS], [4, 5, 6, EOS]]
    prompts = Prompts(PROMPTS.ids, golden, PROMPTS.index, PROMPTS.fields)
    model, rollout = write(prefixed(prefix), prompts)
    assert rollout.author.tolist() == [Author.STUDENT] * 4
    for (row, authors, found), prompt, finish in zip(rows_of(rollout), (0, 0, 1, 2), rollout.finish, strict=True):
        begun = min(prefix, len(golden[prompt]) - 1, 5)
        assert row[:begun] == golden[prompt][:begun]
        assert authors == [Author.GOLDEN] * begun + [Author.STUDENT] * (len(row) - begun)
        assert begun < len(row) <= 6
        assert finish == (Finish.STOP if row[-1] == EOS else Finish.LENGTH)
        assert row[-1] == EOS or len(row) == 6
        assert EOS not in row[:-1]
        assert found[:begun].tolist() == [0.0] * begun
        expected = logprobs_of(model, PROMPTS.ids[prompt] + row[:begun], row[begun:])
        torch.testing.assert_close(found[begun:], expected, rtol=0, atol=1e-4)


def test_row_with_a_prefix_does_not_depend_on_other_rows_with_other_prefixes():
    golden = [[1, 2, EOS], [7, 8, 9, 1, 2, 3, 4, 5, EOS], [4, 5, 6, EOS]]
    prompts = Prompts(PROMPTS.ids, golden, PROMPTS.index, PROMPTS.fields)
    together = completions(write(prefixed(5), prompts, budget=30)[1])
    for prompt, rows in ((0, together[:2]), (1, together[2:3]), (2, together[3:])):
        _, alone = write(prefixed(5, prompt=[prompt] * len(rows)), prompts, budget=30)
        assert completions(alone) == rows


def test_stop_token_beyond_the_budget_was_not_written():
    """Rows with long beginnings are asked for more than is kept; what is not kept ended nothing."""
    stop = list(range(0, VOCABULARY, 3))
    golden = [[1, 2, 4, 5, 7, EOS], [EOS], [1, EOS]]
    prompts = Prompts(PROMPTS.ids, golden, PROMPTS.index, PROMPTS.fields)
    writers = Writers(tiny_model(1), TOKENIZER, TransformersEngine(), 6, stop)
    rollout = writers.carry_out(prefixed(5, prompt=[0] * 20 + [1]), prompts, Temperature(1.0), PARTS)
    for (row, _, _), finish in zip(rows_of(rollout), rollout.finish, strict=True):
        assert finish == (Finish.STOP if row[-1] in stop else Finish.LENGTH)
    assert set(rollout.finish[:20].tolist()) == {Finish.STOP, Finish.LENGTH}


@pytest.mark.parametrize(("prefix", "author"), [(0, Author.GOLDEN), (0, Author.TEACHER), (4, Author.GOLDEN)])
def test_prefix_of_nothing_is_a_row_of_the_students(prefix, author):
    """Annealed to nothing, or before solutions that are a stop token alone."""
    prompts = Prompts(PROMPTS.ids, [[EOS], None, [EOS]], PROMPTS.index, PROMPTS.fields)
    teacher = _Writing(wide())
    _, found = write(prefixed(prefix, author), prompts, teacher=teacher)
    _, expected = write(prefixed(0), prompts)
    assert completions(found) == completions(expected)
    torch.testing.assert_close(found.behaviour_logprobs, expected.behaviour_logprobs)
    assert set(found.token_author.tolist()) == {Author.STUDENT}
    assert found.finish.tolist() == expected.finish.tolist()


def test_budget_of_one_token_leaves_no_room_for_a_prefix():
    _, rollout = write(prefixed(4), budget=1)
    assert rollout.lengths.tolist() == [1] * 4
    assert set(rollout.token_author.tolist()) == {Author.STUDENT}


def test_teachers_prefix_is_followed_by_the_student_unless_it_ended_the_answer():
    teacher, plan = _Writing(wide()), prefixed(3, Author.TEACHER, [0, 1, 2] * 8)
    model, rollout = write(plan, budget=8, teacher=teacher)
    ended = 0
    for number, (row, authors, found) in enumerate(rows_of(rollout)):
        prompt, begun = PROMPTS.ids[plan.prompt[number]], min(3, len(row))
        torch.testing.assert_close(found[:begun], logprobs_of(teacher.model, prompt, row[:begun]), rtol=0, atol=1e-4)
        assert authors[:begun] == [Author.TEACHER] * begun
        if EOS in row[:begun]:
            ended += 1
            assert len(row) == row.index(EOS) + 1
            assert (rollout.author[number], rollout.finish[number]) == (Author.TEACHER, Finish.STOP)
            continue
        assert authors[begun:] == [Author.STUDENT] * (len(row) - begun)
        assert begun < len(row) <= 8
        assert rollout.author[number] == Author.STUDENT
        expected = logprobs_of(model, prompt + row[:begun], row[begun:])
        torch.testing.assert_close(found[begun:], expected, rtol=0, atol=1e-4)
    assert 0 < ended < 24
    assert teacher.visits == 1


def test_answers_that_the_teacher_ended_need_no_student():
    teacher = _Writing(tiny_model(2))
    teacher.model.lm_head.weight.data.zero_()[EOS] = 30 * teacher.model.model.norm.weight.data.sign()
    teacher.model.model.norm.weight.data.zero_()
    plan = prefixed(3, Author.TEACHER)
    writers = Writers(tiny_model(1), TOKENIZER, TransformersEngine(), 6, [*range(VOCABULARY)], teacher)
    rollout = writers.carry_out(plan, PROMPTS, Temperature(1.0), PARTS)
    assert rollout.lengths.tolist() == [1] * 4
    assert rollout.author.tolist() == [Author.TEACHER] * 4


def test_teachers_rows_and_beginnings_differ_and_follow_from_their_keys():
    teacher = _Writing(wide())
    plan = Plan([0, 0, 0], [Author.TEACHER, Author.TEACHER, Author.STUDENT], 4, Author.TEACHER)
    _, rollout = write(plan, teacher=teacher)
    _, again = write(plan, teacher=teacher)
    first, second, third = completions(rollout)
    assert completions(again) == [first, second, third]
    assert len({tuple(first[:4]), tuple(second[:4]), tuple(third[:4])}) == 3


def learned_positions(context):
    """A model that cannot read beyond its context; it is the same for all of them."""
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(**options, n_positions=96, eos_token_id=0, bos_token_id=0)).eval()
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight.data[:context].clone())
    model.config.n_positions = context
    return model


@pytest.mark.parametrize("engine", [TransformersEngine(), InProcessEngine()], ids=lambda each: type(each).__name__)
def test_long_prefixes_beside_short_ones_stay_within_the_context(engine):
    """Learned positions end where the context does: no row may be asked for more than prompt and budget."""
    golden = [[1] * 20 + [EOS], [2, EOS], [3] * 9 + [EOS]]
    prompts = Prompts([[12] * 20, [12, 1], [12] * 11], golden, PROMPTS.index, PROMPTS.fields)
    narrow, roomy = (
        Writers(learned_positions(context), TOKENIZER, engine, 24, []).carry_out(
            prefixed(20, prompt=[0, 1, 2, 0]), prompts, Temperature(1.0), PARTS
        )
        for context in (44, 96)
    )
    assert completions(narrow) == completions(roomy)
    assert narrow.lengths.tolist() == [24] * 4


def test_context_of_the_teacher_counts_where_it_blends():
    golden = [[1] * 20 + [EOS], [2, EOS], [3] * 9 + [EOS]]
    prompts = Prompts([[12] * 20, [12, 1], [12] * 11], golden, PROMPTS.index, PROMPTS.fields)
    blend = Blend(learned_positions(44), partial(mixed, share=0.5))
    _, rollout = write(prefixed(20), prompts, budget=24, blend=blend)
    assert int(rollout.lengths.max()) == 24


def test_rows_with_the_same_beginning_share_its_prefill():
    asked = []

    class Asking(TransformersEngine):
        """Keeps what it is asked for; knows of no blend."""

        def generate(self, model, request, sampler):
            asked.append(request)
            return super().generate(model, request, sampler)

    writers = Writers(tiny_model(1), TOKENIZER, Asking(), 6, [EOS])
    writers.carry_out(prefixed(2, prompt=[0, 0, 2, 2]), PROMPTS, Temperature(1.0), PARTS)
    (request,) = asked
    assert [list(each) for each in request.prompts] == [PROMPTS.ids[0] + [1, 2], PROMPTS.ids[2] + [4, 5]]
    assert list(request.prompt) == [0, 0, 1, 1]


@pytest.mark.parametrize("author", [Author.GOLDEN, Author.TEACHER])
def test_teacher_stays_while_it_has_a_say(author):
    """It writes rows or beginnings first, and is still there when the student's tokens are drawn."""
    teacher = _Writing(wide())
    present = []

    def mix(student, theirs):
        present.append(teacher.here)
        return mixed(student, theirs, 0.5)

    authors = [Author.TEACHER, Author.STUDENT, Author.STUDENT]
    with teacher.present():
        blend = Blend(teacher.language_model, mix)
        model, rollout = write(Plan([0, 0, 2], authors, 2, author), teacher=teacher, blend=blend)
    assert present
    assert all(present)
    for number, prompt in ((1, 0), (2, 2)):
        row, _, found = rows_of(rollout)[number]
        head = PROMPTS.ids[prompt]
        with torch.no_grad():
            ours, theirs = (
                each(torch.tensor([[*head, *row]])).logits[0, len(head) - 1 : -1] for each in (model, teacher.model)
            )
        expected = mixed(ours, theirs, 0.5)[torch.arange(len(row)), row]
        torch.testing.assert_close(found[2:], expected[2:], rtol=0, atol=1e-4)


def test_beginning_by_somebody_who_does_not_write_here_is_refused():
    with pytest.raises(ValueError, match="rows by GOLDEN, STUDENT, but got TEACHER"):
        write(prefixed(2, Author.TEACHER))

"""From rows of a table to examples, on problems of our own in the layouts of published data sets."""

import pytest

import mathematics
from helpers import write_jsonl
from stable_opd import MathVerify
from stable_opd.examples import Reader
from stable_opd.sources import Columns, EvaluationSet, Source

TOKENIZER = mathematics.byte_tokenizer()
OPENR1 = Columns(prompt="problem", golden="generations", answer="answer", judged="correctness_math_verify")


def reader(columns=OPENR1, trains=True, **options):
    return Reader(TOKENIZER, columns, trains=trains, **options)


def text(ids):
    return TOKENIZER.decode(ids)


@pytest.fixture
def openr1(tmp_path):
    return write_jsonl(tmp_path / "openr1.jsonl", mathematics.OPENR1)


def test_golden_solution_is_the_first_that_is_judged_right_and_fits(openr1, log_text):
    found = reader(max_golden_tokens=60).read("train", Source(openr1))
    assert [text(example.golden) for example in found] == [
        r"2+3=5, \boxed{5}</s>",
        r"\boxed{3.5}</s>",
        r"\boxed{12}</s>",
        r"\boxed{100}</s>",
    ]
    assert [example.fields["answer"] for example in found] == ["5", r"\frac{7}{2}", "12", "100"]
    assert [example.fields["generations"] + "</s>" for example in found] == [text(each.golden) for each in found]
    assert (
        f"4 examples from {openr1} (dropped: 1 golden solutions are too long, 1 golden solutions are judged wrong)"
        in (log_text())
    )


def test_without_a_limit_the_first_right_one_is_taken(openr1):
    found = reader().read("train", Source(openr1))
    assert [len(example.golden) > 60 for example in found] == [False, False, True, True, False]


def test_evaluation_drops_nothing_for_its_golden_solutions(openr1):
    found = reader(trains=False, max_golden_tokens=60).read("validation", Source(openr1))
    assert len(found) == 6
    assert [example.golden is None for example in found] == [False, False, True, False, False, False]


def test_a_verdict_may_stand_beside_a_single_solution(tmp_path):
    rows = [{"prompt": "1", "golden": "a", "right": True}, {"prompt": "2", "golden": "b", "right": False}]
    source = Source(write_jsonl(tmp_path / "a.jsonl", rows))
    (example,) = reader(Columns(judged="right")).read("train", source)
    assert text(example.golden) == "a</s>"


def test_missing_verdicts_name_the_column_to_set(tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1", "golden": "a"}]))
    with pytest.raises(ValueError, match=r"column 'right' with the verdicts.*\['prompt', 'golden'\].*columns\.judged"):
        reader(Columns(judged="right")).read("train", source)
    assert reader(Columns(judged="right"), trains=False).read("validation", source)


def test_parts_are_shuffled_always_in_the_same_way_and_share_nothing(tmp_path):
    rows = [{"prompt": str(number)} for number in range(40)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)

    def part(*bounds):
        found = reader(Columns()).read("train", Source(path, part=bounds))
        return [example.fields["prompt"] for example in found]

    first, second = part(0, 15), part(15, 40)
    assert (len(first), len(second)) == (15, 25)
    assert sorted([*first, *second], key=int) == [row["prompt"] for row in rows]
    assert first != sorted(first, key=int)
    assert part(0, 15) == first
    assert part(10, 20) == [*first[10:], *second[:5]]


def test_a_part_is_counted_after_the_filters(openr1, log_text):
    halves = [reader(max_golden_tokens=60).read("train", Source(openr1, part=part)) for part in ((0, 1), (1, 4))]
    names = [example.fields["problem"] for half in halves for example in half]
    everything = reader(max_golden_tokens=60).read("train", Source(openr1))
    assert sorted(names) == sorted(example.fields["problem"] for example in everything)
    assert f"1 of 4 examples from {openr1}" in log_text()


def test_the_last_part_may_be_shorter_but_not_empty(openr1):
    assert len(reader(trains=False).read("validation", Source(openr1, part=(2, 7)))) == 4
    with pytest.raises(ValueError, match=r"some examples of .* in the part \[6, 7\], but there are only 6\. Take"):
        reader(trains=False).read("validation", Source(openr1, part=(6, 7)))


@pytest.mark.parametrize("part", [(3, 3), (-1, 2), (4, 2)])
def test_an_empty_part_is_refused(part):
    with pytest.raises(ValueError, match=r"part \[start, end\) with 0 <= start < end"):
        Source("x", part=part)


@pytest.mark.parametrize("options", [{"samples": -1}, {"temperature": -0.5}])
def test_an_evaluation_set_without_sense_is_refused(options):
    with pytest.raises(ValueError, match="samples and temperature of at least 0"):
        EvaluationSet("x", **options)


@pytest.mark.parametrize(
    ("chat", "prompt"), [(False, "What is $2+3$?\nBox it."), (True, "<user>What is $2+3$?\nBox it.</><assistant>")]
)
def test_instruction_follows_the_problem(chat, prompt):
    example = reader(chat_template=chat, instruction="Box it.").encode(mathematics.OPENR1[0])
    assert text(example.ids) == prompt


def test_instruction_follows_the_last_message():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    example = reader(Columns(), trains=False, chat_template=True, instruction="Box it.").encode({"prompt": messages})
    assert text(example.ids) == "<system>Be brief.</><user>1+1?\nBox it.</><assistant>"
    assert messages[1]["content"] == "1+1?"


def test_right_answers_are_read_from_every_published_layout(tmp_path):
    task, paths = MathVerify(), mathematics.write_sets(tmp_path)
    layouts = {
        "minerva": Columns("question"),
        "olympiad": Columns("question", answer="final_answer"),
    }
    for name, completion in mathematics.RIGHT.items():
        columns = layouts.get(name, Columns("problem"))
        example = reader(columns, trains=False).read(name, Source(paths[name]))[0]
        assert task.grade(completion, example.fields) == 1.0, name
        assert task.grade(r"\boxed{13}", example.fields) == 0.0, name

import itertools
import random
import re

import pytest

from stable_opd import ModularChains
from stable_opd.tasks.chains import WORDS, Chain, Writer, is_runaway

CHAIN = Chain(3, (("*", 7), ("+", 8), ("-", 2)))  # 21, 9 and 7 modulo 10


def test_prompt_golden_and_answer_by_hand():
    assert CHAIN.prompt == "Q 3 * 7 + 8 - 2 ;"
    assert CHAIN.golden == "3 * 7 = 1 ; 1 + 8 = 9 ; 9 - 2 = 7 ; # 7"
    assert CHAIN.answer == "7"


def test_negative_intermediate_results_wrap_around():
    assert Chain(1, (("-", 5),)).answer == "6"


@pytest.mark.parametrize("seed", range(20))
def test_drawn_chains_agree_with_python_arithmetic(seed):
    chain = Chain.draw(random.Random(seed), length=4)
    words = chain.prompt.split()
    expression = words[1]
    for op, operand in zip(words[2:-1:2], words[3:-1:2], strict=True):
        expression = f"(({expression}) {op} {operand}) % 10"
    assert chain.answer == str(eval(expression))  # a second evaluator; the words are our own
    assert chain.golden.split()[-1] == chain.answer
    assert set(words) | set(chain.golden.split()) <= set(WORDS)


def test_golden_solution_gets_full_marks_and_a_wrong_one_none():
    assert ModularChains().grade(CHAIN.golden, {"answer": "7"}) == 1.0
    assert ModularChains().grade(CHAIN.golden, {"answer": "2"}) == 0.0


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("# 1", 1.0),
        ("3 * 7 = 9 ? # 1", 1.0),
        ("# 1 ;", 0.0),
        ("# 1 # 1", 0.0),
        ("# 2 # 1", 0.0),
        ("#", 0.0),
        ("1", 0.0),
        ("", 0.0),
        ("# 11", 0.0),
    ],
)
def test_grades_by_hand(completion, grade):
    assert ModularChains().grade(completion, {"answer": "1"}) == grade


def test_answer_may_be_a_number():
    assert ModularChains().grade("# 1", {"answer": 1}) == 1.0


def lines_of(text):
    """The lines of a solution, each with the mark that ends it, without the answer."""
    return [line.split() for line in re.findall(r"[^;?#]+[;?]", text)]


def test_flagged_mistakes_are_written_again_and_do_not_matter():
    text = Writer(mistakes=1.0, flagged=1.0).solve(CHAIN, random.Random(0))
    lines = lines_of(text)
    assert [line[-1] for line in lines] == ["?", ";"] * 3
    for wrong, right, value in zip(lines[::2], lines[1::2], ["1", "9", "7"], strict=True):
        assert wrong[:4] == right[:4]
        assert right[4] == value
        assert wrong[4] != value
    assert ModularChains().grade(text, {"answer": "7"}) == 1.0


def test_after_other_mistakes_the_author_goes_on_with_the_wrong_value():
    text = Writer(mistakes=1.0, flagged=0.0).solve(CHAIN, random.Random(0))
    lines = lines_of(text)
    assert [line[-1] for line in lines] == [";"] * 3
    for line, following in itertools.pairwise(lines):
        assert following[0] == line[4]
    for line in lines:
        assert int(line[4]) != eval(" ".join(line[:3])) % 10
    assert text.endswith(f"# {lines[-1][4]}")
    assert not is_runaway(text)


def test_runaway_documents_repeat_a_wrong_line_to_the_end():
    text = Writer(mistakes=1.0, flagged=0.0, runaway=1.0).solve(CHAIN, random.Random(0), words=40)
    words = text.split()
    assert is_runaway(text)
    assert len(words) == 40
    assert words[:4] == ["3", "*", "7", "="]
    assert words[4] != "1"
    assert all(words[place] == words[place - 6] for place in range(6, 40))


def test_stutter_repeats_lines_and_changes_no_answer():
    text = Writer(mistakes=0.0, stutter=1.0).solve(CHAIN, random.Random(0))
    lines = lines_of(text)
    assert [line for line, _ in itertools.groupby(lines)] == lines_of(CHAIN.golden)
    assert all(len(list(copies)) >= 2 for _, copies in itertools.groupby(lines))
    assert ModularChains().grade(text, {"answer": "7"}) == 1.0


@pytest.mark.parametrize(("flagged", "runaway"), [(0.3, 0.35), (0.5, 0.0), (0.0, 1.0)])
def test_shares_of_what_becomes_of_a_mistake(flagged, runaway):
    """One wrong line each in 2000 documents of one line; 0.05 is four standard deviations and more."""
    writer = Writer(mistakes=1.0, flagged=flagged, runaway=runaway)
    rng = random.Random(0)
    texts = [writer.solve(Chain(3, (("*", 7),)), rng, words=20) for _ in range(2000)]
    assert sum(map(is_runaway, texts)) / 2000 == pytest.approx(runaway, abs=0.05)
    assert sum("?" in text for text in texts) / 2000 == pytest.approx(flagged, abs=0.05)


def test_share_of_lines_with_a_mistake():
    rng = random.Random(0)
    texts = [Writer(mistakes=0.2, flagged=1.0).solve(CHAIN, rng) for _ in range(1000)]
    assert sum(text.count("?") for text in texts) / 3000 == pytest.approx(0.2, abs=0.03)

import pytest

from stable_opd import ExactMatch


@pytest.mark.parametrize(
    ("completion", "grade"),
    [
        ("so #### 42", 1.0),
        ("#### 41 no, #### 42 \n", 1.0),
        ("#### 42 #### 41", 0.0),
        ("#### 42 apples", 0.0),
        ("42", 0.0),
        ("####", 0.0),
        ("", 0.0),
    ],
)
def test_text_after_the_last_marker_is_compared(completion, grade):
    assert ExactMatch().grade(completion, {"answer": "42"}) == grade


def test_answer_may_be_a_number_or_have_white_space():
    assert ExactMatch().grade("#### 42", {"answer": 42}) == 1.0
    assert ExactMatch().grade("#### 42", {"answer": " 42\n"}) == 1.0


def test_empty_marker_compares_the_whole_completion():
    assert ExactMatch(marker="").grade(" yes ", {"answer": "yes"}) == 1.0
    assert ExactMatch(marker="").grade("oh yes", {"answer": "yes"}) == 0.0


def test_another_marker():
    assert ExactMatch("A:").grade("#### 8 A: 7", {"answer": 7}) == 1.0


def test_missing_column_is_named_with_those_that_exist():
    with pytest.raises(
        ValueError, match=r"right answer, but .* only the columns \['prompt', 'solution'\].*data\.columns\.answer"
    ):
        ExactMatch().grade("#### 1", {"solution": 1, "prompt": ""})

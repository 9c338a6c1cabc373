from pathlib import Path

import pytest

from helpers import EOS, TOKENIZER
from helpers import problems as some_problems
from stable_opd.tasks.chains import WORDS
from stable_opd.testbed import PLACES, resolve
from stable_opd.testbed.build import CONTEXT, TRAINING_PROBLEMS, VALIDATION_PROBLEMS, encode, problems


def test_every_word_of_the_task_is_one_token():
    assert [TOKENIZER.encode(word) for word in WORDS] == [[index] for index in range(len(WORDS))]


@pytest.mark.parametrize("problem", some_problems(10, seed=3))
def test_prompt_and_solution_are_encoded_as_if_they_stood_together(problem):
    """Otherwise a student would see other tokens in training than after its own prompt."""
    prompt, golden = problem["prompt"], problem["golden"]
    assert TOKENIZER.encode(prompt) + TOKENIZER.encode(golden) == TOKENIZER.encode(f"{prompt} {golden}")
    assert TOKENIZER.decode(TOKENIZER.encode(golden)) == golden


def test_special_tokens_are_left_out_of_texts():
    ids = [*TOKENIZER.encode("# 1"), EOS, TOKENIZER.pad_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "# 1"


def test_documents_have_labels_on_the_solution_and_the_stop_token_only():
    ids, labels = encode([("Q 1 + 1 ;", "1 + 1 = 2 ; # 2"), ("Q 1 ;", "# 1")], TOKENIZER)
    first, second = TOKENIZER.encode("1 + 1 = 2 ; # 2"), TOKENIZER.encode("# 1")
    assert ids[0].tolist() == [*TOKENIZER.encode("Q 1 + 1 ;"), *first, EOS]
    assert labels[0].tolist() == [-100] * 5 + [*first, EOS]
    assert ids[1, :6].tolist() == [*TOKENIZER.encode("Q 1 ;"), *second, EOS]
    assert labels[1].tolist() == [-100] * 3 + [*second, EOS] + [-100] * (ids.shape[1] - 6)


def test_runaway_document_has_no_stop_token_and_ends_with_the_context_at_the_latest():
    lines = "1 + 1 = 3 ; 1 + 1 = 3 ;"
    ids, labels = encode([("Q 1 + 1 ;", lines)], TOKENIZER)
    assert ids[0].tolist() == TOKENIZER.encode(f"Q 1 + 1 ; {lines}")
    ids, labels = encode([("Q 1 + 1 ;", " ".join([lines] * CONTEXT))], TOKENIZER)
    assert ids.shape == labels.shape == (1, CONTEXT)
    assert EOS not in ids[0].tolist()


def test_problems_to_train_and_to_validate_on_are_different_and_fixed():
    found = problems()
    assert len(found["train"]) == len(set(found["train"])) == TRAINING_PROBLEMS
    assert len(found["validation"]) == len(set(found["validation"])) == VALIDATION_PROBLEMS
    assert not set(found["train"]) & set(found["validation"])
    assert problems() == found


@pytest.mark.parametrize("name", PLACES)
def test_testbed_names_lead_into_the_package(name):
    assert resolve(f"testbed:{name}") == str(PLACES[name])
    assert "testbed" in Path(resolve(f"testbed:{name}")).parts


def test_other_paths_come_back_as_they_are():
    assert resolve("some/folder") == "some/folder"


def test_unknown_testbed_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"testbed:student.*testbed:validation.*but got 'testbed:pupil'"):
        resolve("testbed:pupil")

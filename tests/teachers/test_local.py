import pytest
import torch

from helpers import TOKENIZER, make_rollout, save, tiny_model
from stable_opd import LocalTeacher
from stable_opd.testbed.build import make_tokenizer

CPU = torch.device("cpu")


def test_scores_are_those_of_the_model_in_the_folder(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    rollout = make_rollout([[1, 2, 3]], [[4, 5]])
    with torch.no_grad():
        expected = tiny_model(2)(torch.tensor([[4, 5, 1, 2, 3]])).logits[0, 1:4].log_softmax(-1)
    scored = teacher.score(rollout)
    torch.testing.assert_close(scored.head.logits(scored.states).log_softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_model_is_frozen_in_evaluation_mode_and_scores_carry_no_gradient(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.score(make_rollout([[1, 2, 3]])).states.requires_grad


def test_second_setup_keeps_the_loaded_model(teacher_path):
    """The module calls it again when the device is known."""
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    model = teacher.model
    teacher.setup("student", TOKENIZER, CPU)
    assert teacher.model is model


def test_scores_before_setup_are_an_error_that_says_so(teacher_path):
    with pytest.raises(RuntimeError, match="before its `setup`"):
        LocalTeacher(teacher_path).score(make_rollout([[1]]))


def test_context_length_is_the_models(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    assert teacher.context_length == 96


def test_other_vocabulary_is_refused_by_name(teacher_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["&"])
    with pytest.raises(ValueError, match=r"student only.*'&'"):
        LocalTeacher(teacher_path).setup("the-pupil", tokenizer, CPU)


def test_a_model_padded_to_a_larger_vocabulary_is_cut_to_the_shared_one(tmp_path):
    path = save(tiny_model(5, vocab_size=len(TOKENIZER) + 9), tmp_path)
    teacher = LocalTeacher(path)
    teacher.setup("student", TOKENIZER, CPU)
    scored = teacher.score(make_rollout([[1, 2]]))
    assert scored.head.logits(scored.states).shape == (2, len(TOKENIZER))

"""A teacher meets the student and the data."""

import pytest
import torch

from helpers import TOKENIZER, make_trainer, tiny_model
from stable_opd import LocalTeacher, PromptDataModule
from stable_opd.sources import Source
from stable_opd.teachers.introduction import Answers, introduce


class Noting(LocalTeacher):
    """Notes what it is told."""

    def __init__(self, columns=("golden",)):
        self.columns, self.told = columns, []

    def meet(self, student, tokens):
        self.told.append(("meet", student, tokens("Q 1 * 7 ;")))

    def setup(self, student, tokenizer, device):
        self.told.append(("setup", student, tokenizer, device))

    def check(self, examples, budget):
        self.told.append(("check", len(examples), budget))


@pytest.fixture
def data(train_path):
    """A data module that has read its examples."""

    class Holder(torch.nn.Module):
        tokenizer = TOKENIZER

    data = PromptDataModule(Source(train_path), instruction="; 1")
    data.trainer = make_trainer()
    data.trainer.strategy._lightning_module = Holder()
    data.batch_size = 4
    data.setup("fit")
    return data


@pytest.mark.parametrize("golden", [False, True])
def test_teacher_meets_the_student_before_it_is_set_up_and_the_examples_after_it(data, golden):
    teacher, student, cpu = Noting(), tiny_model(1), torch.device("cpu")
    introduce(teacher, "pupil", student, TOKENIZER, cpu, Answers(data, 5, golden))
    longest = data.longest_golden if golden else 5
    assert longest > 5 or not golden
    assert teacher.told == [
        ("meet", student, TOKENIZER.encode("Q 1 * 7 ;\n; 1")),
        ("setup", "pupil", TOKENIZER, cpu),
        ("check", 24, longest),
    ]


def test_where_prompts_come_from_elsewhere_they_are_encoded_as_they_are(data):
    teacher = Noting()
    introduce(teacher, "pupil", None, TOKENIZER, torch.device("cpu"), Answers(None, 5))
    assert teacher.told[0] == ("meet", None, TOKENIZER.encode("Q 1 * 7 ;"))
    assert len(teacher.told) == 2


def test_examples_are_for_teachers_who_read_them(data):
    teacher = Noting(columns=())
    introduce(teacher, "pupil", None, TOKENIZER, torch.device("cpu"), Answers(data, 5))
    assert [name for name, *_ in teacher.told] == ["meet", "setup"]

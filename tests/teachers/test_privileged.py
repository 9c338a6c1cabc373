"""A teacher who reads another prompt, and the student as its own."""

from contextlib import nullcontext

import pytest
import torch

from helpers import TOKENIZER, Recorder, make_rollout, make_trainer, problems, save, tiny_model, weights, write_jsonl
from stable_opd import (
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReverseKL,
    StudentOnly,
)
from stable_opd.options import RolloutOptions
from stable_opd.sources import Source
from stable_opd.students import LoRA, adapters_off, load_student
from stable_opd.teachers import PrivilegedTeacher, SelfTeacher

CPU = torch.device("cpu")
TEMPLATE = "{prompt} {golden}"


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False)


def logprobs(opinion):
    return opinion.head.logits(opinion.states).log_softmax(-1)


def ready(teacher, student=None, tokens=encode):
    teacher.meet(student, tokens)
    teacher.setup("student", TOKENIZER, CPU)
    return teacher


def test_tokens_are_scored_after_the_privileged_prompt(teacher_path):
    teacher = ready(PrivilegedTeacher(LocalTeacher(teacher_path), TEMPLATE))
    fields = [{"prompt": "Q 1 * 7 ;", "golden": "7 ; # 7"}, {"prompt": "Q 2 ;", "golden": "2"}]
    found = logprobs(teacher.score(make_rollout([[1, 2, 3], [4]], [[4, 5], [6]], fields=fields)))
    model, expected = tiny_model(2), []
    for each, answer in zip(fields, ([1, 2, 3], [4]), strict=True):
        ids = [*encode(f"{each['prompt']} {each['golden']}"), *answer]
        with torch.no_grad():
            whole = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected.append(whole[-len(answer) - 1 : -1])
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_prompt_is_made_as_the_data_module_makes_the_students(student_path, train_path, tmp_path):
    """With its instruction and its chat template; equal to the student's where the template is the prompt."""
    seen = []

    class Watching(SelfTeacher):
        """Keeps what it reads."""

        def score(self, rollout):
            seen.append(rollout)
            return super().score(rollout)

    template = "{% for message in messages %}Q {{ message['content'] }} ;{% endfor %}"
    data = PromptDataModule(Source(train_path), batch_size=4, chat_template=True, instruction="; 1")
    module = module_of(student_path, PrivilegedTeacher(Watching(), "{prompt}"))
    module.tokenizer.chat_template = template
    recorder = Recorder()
    make_trainer(recorder, max_steps=1).fit(module, data)
    (read,) = seen
    prompts = {tuple(example.ids) for example in data.examples["train"]}
    starts = read.starts.tolist()
    assert {tuple(read.tokens[a : a + b].tolist()) for a, b in zip(starts, read.prompt_lengths, strict=True)} <= prompts
    assert recorder.steps[0]["train/value/divergence"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("template", "expected"),
    [("Solve it.", "a template with columns in braces"), ("{} {golden}", "a template with columns in braces")],
)
def test_template_without_a_column_is_refused(template, expected):
    with pytest.raises(ValueError, match=expected):
        PrivilegedTeacher(SelfTeacher(), template)


def test_braces_are_doubled_and_columns_are_looked_up_by_their_names_alone():
    teacher = ready(PrivilegedTeacher(SelfTeacher(), "{{{a.b}}} {c!s}"), tiny_model(1), tokens=lambda text: text)
    assert teacher.columns == ("a.b", "c")
    assert teacher._prompt({"a.b": "7", "c": 8}) == "{7} 8"


def test_nobody_looks_into_what_a_column_holds():
    teacher = ready(PrivilegedTeacher(SelfTeacher(), "{a.__class__}"), tiny_model(1))
    with pytest.raises(ValueError, match=r"text or a number in the column 'a\.__class__'"):
        teacher._prompt({"a": "7"})


def module_of(student, teacher, mixture=None, lr=1e-2, **options):
    return OPDModule(
        student,
        teacher,
        ReverseKL(),
        mixture or GoldenMixture(weight=0.0),
        PeriodicSuffix(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=lr),
        rollout=RolloutOptions(samples_per_prompt=1, max_new_tokens=8),
        **options,
    )


def fit(module, path, steps=2):
    recorder = Recorder()
    make_trainer(recorder, max_steps=steps).fit(module, PromptDataModule(Source(path), batch_size=4))
    return recorder.steps


@pytest.mark.parametrize(
    ("changes", "template", "expected"),
    [
        ({"golden": None}, TEMPLATE, "Expected examples with 'golden', because PrivilegedTeacher reads it"),
        ({}, "{prompt} {solution}", "Expected examples with 'solution'"),
        ({"golden": ["1", "2"]}, "{prompt} {golden} {prompt}", None),
        ({"hint": ["1"]}, "{hint}", r"text or a number in the column 'hint', .* but got \['1'\]"),
        (
            {"golden": "1 ; " * 40 + "# 1"},
            TEMPLATE,
            r"96 tokens at most, .* a prompt of \d+ and answers of up to 8",
        ),
    ],
    ids=["empty", "missing", "several to choose from", "no text", "too long"],
)
def test_examples_that_cannot_be_read_are_refused_before_the_first_step(
    student_path, teacher_path, tmp_path, changes, template, expected
):
    examples = [each | {"hint": "1"} for each in problems(8)]
    lists = {name: each for name, each in changes.items() if isinstance(each, list)}  # or none in the whole column
    path = write_jsonl(tmp_path / "train.jsonl", [*(each | lists for each in examples[:7]), examples[7] | changes])
    mixture = StudentOnly() if changes.get("golden", "") is None else None
    module = module_of(student_path, PrivilegedTeacher(LocalTeacher(teacher_path), template), mixture)
    with nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
        fit(module, path, 0)


def test_prompt_of_no_tokens_is_refused(teacher_path):
    """Nothing would predict the first token of the answer."""
    teacher = ready(PrivilegedTeacher(LocalTeacher(teacher_path), "{golden}"))
    with pytest.raises(ValueError, match=r"privileged prompt of some tokens, but got none from \{'golden': ''\}"):
        teacher.check([{"golden": "1"}, {"golden": ""}], 4)


def test_row_that_is_too_long_is_refused_and_not_cut(teacher_path):
    teacher = ready(PrivilegedTeacher(LocalTeacher(teacher_path), "{golden}"))
    long = {"golden": "1 " * 95}
    assert len(teacher.score(make_rollout([[1]], fields=[long])).states) == 1
    with pytest.raises(ValueError, match="got a prompt of 95 and answers of up to 2"):
        teacher.score(make_rollout([[1], [1, 2]], fields=[{"golden": "1"}, long]))


def test_student_is_its_own_teacher(student_path, train_path):
    """What it says is what the student says, which changes as it learns; and no gradient flows into it."""
    taught, told = (
        module_of(student_path, PrivilegedTeacher(inner, "{prompt} ; {golden}"), lr=0.3)
        for inner in (LocalTeacher(student_path), SelfTeacher())
    )
    fixed, moving = fit(taught, train_path), fit(told, train_path)
    for name in ("train/value/divergence", "train/grad_norm"):
        assert moving[0][name] == pytest.approx(fixed[0][name], rel=1e-5)
        assert moving[1][name] != pytest.approx(fixed[1][name], rel=1e-4)
    assert moving[0]["train/value/divergence"] > 0.01


def test_without_privilege_there_is_nothing_to_learn(student_path, train_path):
    module = module_of(student_path, SelfTeacher())
    steps = fit(module, train_path)
    assert steps[0]["train/value/divergence"] == pytest.approx(0, abs=1e-6)
    for name, weight in weights(module).items():
        torch.testing.assert_close(weight, dict(tiny_model(1).named_parameters())[name], rtol=0, atol=1e-5)


def test_student_reads_in_evaluation_mode_and_goes_on_learning():
    student = tiny_model(1, attention_dropout=0.5).train()
    teacher = ready(SelfTeacher(), student)
    opinion = teacher.score(make_rollout([[1, 2, 3]], [[4, 5]]))
    with torch.no_grad():
        expected = tiny_model(1)(torch.tensor([[4, 5, 1, 2, 3]])).logits[0, 1:4].log_softmax(-1)
    torch.testing.assert_close(logprobs(opinion), expected, rtol=1e-4, atol=1e-5)
    assert student.training
    assert not opinion.states.requires_grad
    assert not opinion.head.weight.requires_grad
    assert teacher.footprint == 0


def test_student_with_adapters_is_scored_with_them(student_path):
    pytest.importorskip("peft")
    student = load_student(student_path, LoRA(rank=2))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    teacher, rollout = ready(SelfTeacher(), student), make_rollout([[1, 2, 3]], [[4, 5]])
    found = logprobs(teacher.score(rollout))
    student.eval()
    with torch.no_grad():
        expected = student(rollout.tokens[None]).logits[0, 1:4].log_softmax(-1)
        with adapters_off(student):
            without = student(rollout.tokens[None]).logits[0, 1:4].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - without).abs().max() > 0.1


def test_student_that_was_never_met_is_an_error_that_says_so():
    with pytest.raises(RuntimeError, match="told who it is by `meet`"):
        SelfTeacher().score(make_rollout([[1]]))
    with pytest.raises(RuntimeError, match="told by `meet` how prompts become tokens"):
        PrivilegedTeacher(SelfTeacher(), "{golden}").score(make_rollout([[1]], fields=[{"golden": "1"}]))


def test_privileged_teacher_serves_what_its_teacher_serves(tmp_path, teacher_path):
    resting = LocalTeacher(teacher_path, offload=True)
    teacher = ready(PrivilegedTeacher(resting, "{golden}"))
    assert (teacher.support, teacher.k, teacher.offload) == ("full", None, True)
    assert (teacher.stop_ids, teacher.footprint) == (resting.stop_ids, resting.footprint)
    assert teacher.context_length == resting.context_length
    assert teacher.identity != PrivilegedTeacher(resting, "{answer}").identity
    other = PrivilegedTeacher(LocalTeacher(save(tiny_model(4), tmp_path)), "{golden}")
    assert teacher.identity != other.identity

"""The module in a trainer: what a step does, and what is logged about it."""

import csv
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from helpers import (
    EOS,
    TOKENIZER,
    VOCABULARY,
    Recorder,
    make_trainer,
    naive_repeated,
    problems,
    save,
    tiny_model,
    weights,
    write_jsonl,
)
from stable_opd import (
    Author,
    Constraint,
    Divergence,
    ExactMatch,
    Finish,
    GoldenMixture,
    Linear,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    SampledReverseKL,
    StudentOnly,
    TokenLoss,
    TransformersEngine,
)
from stable_opd.divergences import ForwardKL
from stable_opd.mixtures import TeacherMixing, TeacherMixture
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.sources import EvaluationSet, Source
from stable_opd.teachers.base import NOBODY

SGD = partial(torch.optim.SGD, lr=0.1)
BUDGET = 10


@pytest.fixture
def build(student_path, teacher_path):
    """Make a module; what a test does not name is small and plain."""

    def build(**options):
        samples = options.pop("samples", 2)
        parts = {
            "student": student_path,
            "teacher": LocalTeacher(options.pop("teacher", teacher_path)),
            "divergence": ReverseKL(),
            "mixture": StudentOnly(),
            "repetition": PeriodicSuffix(4, 3, 3),
            "optimizer": SGD,
            "rollout": RolloutOptions(samples_per_prompt=samples, max_new_tokens=BUDGET),
        }
        return OPDModule(**parts | options)

    return build


@pytest.fixture
def data(train_path, validation_path):
    """Make a data module; a fresh one for each trainer."""

    def data(batch_size=4, train=train_path, validation=None, task=None, **options):
        source = Source(train) if train else None
        examined = EvaluationSet(validation) if validation else None
        return PromptDataModule(source, examined, task=task, batch_size=batch_size, **options)

    return data


def fit(module, data, steps=2, **options):
    recorder = Recorder()
    make_trainer(recorder, max_steps=steps, **options).fit(module, datamodule=data)
    return recorder


def assert_same_weights(found, expected, **tolerance):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("micro_batch_tokens", [60, 16_384])
def test_fine_tuning_alone_equals_plain_cross_entropy_training(
    aggregation, micro_batch_tokens, build, data, train_path
):
    """No rollouts and golden rows only; all 24 problems in every batch, so that their order does not matter."""
    update = UpdateOptions(aggregation, micro_batch_tokens, gradient_clip=1e9)
    module = build(samples=0, mixture=GoldenMixture(0.5), update=update)
    fit(module, data(batch_size=24), steps=3)

    model = tiny_model(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        losses = []
        for record in problems(24):
            prompt, golden = TOKENIZER.encode(record["prompt"]), [*TOKENIZER.encode(record["golden"]), EOS]
            logits = model(torch.tensor([prompt + golden])).logits[0, len(prompt) - 1 : -1]
            losses.append(F.cross_entropy(logits, torch.tensor(golden), reduction="none"))
        mean = (
            torch.cat(losses).mean() if aggregation == "token_mean" else torch.stack([x.mean() for x in losses]).mean()
        )
        optimizer.zero_grad()
        (0.5 * mean).backward()
        optimizer.step()
    assert_same_weights(weights(module), dict(model.named_parameters()), rtol=1e-4, atol=1e-5)
    moved = (model.lm_head.weight - tiny_model(1).lm_head.weight).abs().max()
    assert moved > 0.01


def test_without_a_row_for_the_teacher_none_is_loaded(build, data):
    """Not even looked for."""
    steps = fit(build(samples=0, mixture=GoldenMixture(), teacher="no-such-teacher"), data(), steps=1).steps
    assert math.isnan(steps[0].get("train/advantage_mean", math.nan))
    for mixture in (GoldenMixture(loss=ForwardKL()), TeacherMixture(), TeacherMixing()):
        with pytest.raises(ValueError, match=r"a tokenizer.*no-such-teacher"):
            fit(build(samples=0, mixture=mixture, teacher="no-such-teacher"), data(), steps=1)


@pytest.mark.parametrize(("samples", "mixture"), [(1, GoldenMixture), (0, TeacherMixture), (0, GoldenMixture)])
def test_teacher_may_be_left_out_where_there_is_no_row_for_it(samples, mixture, build, data):
    module = build(samples=samples, mixture=mixture())
    module.readers.teacher = NOBODY
    if (samples, mixture) == (0, GoldenMixture):
        fit(module, data(), steps=1)
        return
    with pytest.raises(ValueError, match="Expected a teacher, because there are rows for it"):
        fit(module, data(), steps=1)


@pytest.mark.parametrize("divergence", [ReverseKL, SampledReverseKL])
def test_teacher_equal_to_the_student_changes_nothing(divergence, build, data, student_path):
    module = build(teacher=student_path, divergence=divergence(), constraints={"anchor": ReferenceKL(1.0)})
    recorder = fit(module, data())
    assert_same_weights(weights(module), dict(tiny_model(1).named_parameters()), rtol=0, atol=1e-5)
    for step in recorder.steps:
        assert step["train/loss"] == pytest.approx(0, abs=1e-5)
        assert step["train/advantage_mean"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("mixture", [StudentOnly, GoldenMixture])
def test_micro_batches_do_not_change_the_run(mixture, build, data):
    runs = []
    for tokens in (30, 16_384):
        module = build(
            mixture=mixture(), constraints={"anchor": ReferenceKL(0.1)}, update=UpdateOptions(micro_batch_tokens=tokens)
        )
        runs.append((fit(module, data()), weights(module)))
    (small, small_weights), (large, large_weights) = runs
    assert_same_weights(small_weights, large_weights, rtol=1e-4, atol=1e-5)
    for name in ("train/loss", "train/grad_norm", "train/entropy_student", "train/log_ratio_p99", "train/value/anchor"):
        # In the first step the student is its own reference, whose KL is zero up to rounding.
        expected = pytest.approx([step[name] for step in large.steps], rel=1e-4, abs=1e-7)
        assert [step[name] for step in small.steps] == expected


def test_rollouts_are_written_by_the_student_as_it_is(build, data):
    """On policy: in every step the log-probs captured while sampling are those that are trained."""
    gaps = []

    class OnPolicy(Divergence):
        """Measures how far the author and the student are apart."""

        def forward(self, evidence):
            gaps.append((evidence.student.sampled - evidence.behaviour_logprobs).abs().max().item())
            loss = evidence.teacher.sampled.detach() * -evidence.student.sampled
            return TokenLoss(loss, loss.detach(), evidence.written_by(Author.STUDENT))

    fit(build(divergence=OnPolicy()), data(), steps=3)
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


class _Keeping(TransformersEngine):
    """Keeps what it wrote, and in which mode the model was."""

    def __init__(self):
        self.written = []
        self.modes = []

    def generate(self, model, request, sampler):
        self.modes.append(model.training)
        self.written.append((request, super().generate(model, request, sampler)))
        return self.written[-1][1]


def test_rollouts_are_written_without_dropout_and_learnt_with_it(build, data):
    engine, modes = _Keeping(), []

    class Watching(LocalTeacher):
        """Looks at the student's mode while the rows are scored."""

        def score(self, rollout):
            modes.append(module.model.training)
            return super().score(rollout)

    module = build(engine=engine)
    module.readers.teacher = Watching(module.readers.teacher.path)
    fit(module, data(), steps=2)
    assert engine.modes == [False, False]
    assert modes == [True, True]


def test_each_step_draws_anew(build, data):
    """The same student (a rate of 0) and the same prompts in both steps, but other answers."""
    engine = _Keeping()
    fit(build(engine=engine, optimizer=partial(torch.optim.SGD, lr=0.0)), data(batch_size=24), steps=2)
    rows = [
        dict(zip(map(tuple, (request.prompts[n] for n in request.prompt)), _rows(completions), strict=True))
        for request, completions in engine.written
    ]
    assert rows[0].keys() == rows[1].keys()
    assert sum(rows[0][prompt] != rows[1][prompt] for prompt in rows[0]) > len(rows[0]) / 2


def _rows(completions):
    return [row.tolist() for row in completions.tokens.split(completions.lengths.tolist())]


def test_logged_figures_equal_those_computed_from_the_rollouts(build, data):
    """Lengths, rates and advantages of a step, from what the engine wrote and from full forward passes."""
    engine = _Keeping()
    module = build(samples=4, engine=engine, constraints={"anchor": ReferenceKL(0.5)})
    recorder = fit(module, data(batch_size=6), steps=1)
    ((request, completions),), (logged,) = engine.written, recorder.steps
    lengths = completions.lengths.tolist()
    assert len(lengths) == 24
    student, teacher = tiny_model(1), tiny_model(2)
    advantages, marks, divergence = [], [], []
    for row, number, finish in zip(
        completions.tokens.split(lengths), request.prompt, completions.finish.tolist(), strict=True
    ):
        prompt = list(request.prompts[number])
        with torch.no_grad():
            p, q = (
                each(torch.tensor([prompt + row.tolist()])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for each in (student, teacher)
            )
        advantages.append((q - p).gather(1, row[:, None]).squeeze(1))
        divergence.append(F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean())
        tail = row.tolist()[:-1] if finish == Finish.STOP else row.tolist()
        looped = naive_repeated(tail, 4, 3, 3)
        marks.append(torch.tensor([len(tail) - looped <= place < len(tail) for place in range(len(row))]))
    advantage, mark = torch.cat(advantages), torch.cat(marks)
    ordered = sorted(lengths)
    expected = {
        "train/length_mean": sum(lengths) / 24,
        "train/length_p95": ordered[math.ceil(0.95 * 24) - 1],
        "train/length_max": ordered[-1],
        "train/truncation_rate": (completions.finish != Finish.STOP).float().mean().item(),
        "train/repetition_rate": sum(bool(each.any()) for each in marks) / 24,
        "train/repeated_share": mark.float().mean().item(),
        "train/advantage_mean": advantage.mean().item(),
        "train/advantage_regular": advantage[~mark].mean().item(),
        "train/advantage_repeated": advantage[mark].mean().item(),
        "train/log_ratio_p99": advantage.abs().sort().values[math.ceil(0.99 * len(advantage)) - 1].item(),
        "train/loss/divergence": torch.stack(divergence).mean().item(),
        "train/value/divergence": torch.stack(divergence).mean().item(),
        "train/value/anchor": 0.0,
        "train/length_inflation": 1.0,
    }
    assert 0 < expected["train/truncation_rate"] < 1
    assert expected["train/repeated_share"] > 0
    assert {name: logged[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_gradient_is_clipped_and_its_norm_logged_before(build, data):
    """SGD at a rate of 1 moves by the clipped gradient."""
    module = build(optimizer=partial(torch.optim.SGD, lr=1.0), update=UpdateOptions(gradient_clip=0.25))
    recorder = fit(module, data(), steps=1)
    start = dict(tiny_model(1).named_parameters())
    moved = torch.cat([(after - start[name]).flatten() for name, after in weights(module).items()]).norm().item()
    assert recorder.steps[0]["train/grad_norm"] > 0.5
    assert moved == pytest.approx(0.25, rel=1e-3)


def test_small_gradient_is_not_clipped(build, data):
    module = build(optimizer=partial(torch.optim.SGD, lr=1.0), update=UpdateOptions(gradient_clip=1e9))
    recorder = fit(module, data(), steps=1)
    start = dict(tiny_model(1).named_parameters())
    moved = torch.cat([(after - start[name]).flatten() for name, after in weights(module).items()]).norm().item()
    assert moved == pytest.approx(recorder.steps[0]["train/grad_norm"], rel=1e-3)


def test_schedules_follow_the_share_of_the_training(build, data):
    module = build(mixture=GoldenMixture(2.0, Linear(1.0, 0.0)))
    recorder = fit(module, data(), steps=4)
    factors = [step["train/loss/mixture"] / step["train/value/mixture"] for step in recorder.steps]
    assert factors == pytest.approx([2.0, 1.5, 1.0, 0.5], rel=1e-5)


def test_learning_rate_schedule_advances_with_every_step(build, data):
    """A factor of 0 after the first step: the second must change nothing."""
    module = build(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: float(n < 1)))
    after_first = {}

    class Snapshot(Recorder):
        """Keeps the weights after the first step."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 1:
                after_first.update(weights(pl_module))

    make_trainer(Snapshot(), max_steps=3).fit(module, datamodule=data())
    assert_same_weights(weights(module), after_first, rtol=0, atol=0)
    assert any((after_first[name] != tensor).any() for name, tensor in tiny_model(1).named_parameters())


def test_constraints_learn_of_their_value_once_per_step(build, data):
    class Adaptive(Constraint):
        """Reports its position and keeps what it is told."""

        def __init__(self):
            super().__init__()
            self.told = []

        def forward(self, evidence):
            value = evidence.position.float()
            return TokenLoss(0 * evidence.student.sampled, value, evidence.written_by(Author.STUDENT))

        def adapt(self, value):
            self.told.append(float(value))

    constraint = Adaptive()
    module = build(constraints={"adaptive": constraint}, update=UpdateOptions(micro_batch_tokens=40))
    recorder = fit(module, data(), steps=3)
    assert constraint.told == [step["train/value/adaptive"] for step in recorder.steps]
    assert all(value > 0 for value in constraint.told)


def test_constraint_that_is_null_is_switched_off(build, data):
    module = build(constraints={"anchor": None, "other": ReferenceKL(0.1)})
    (step,) = fit(module, data(), steps=1).steps
    assert "train/loss/other" in step
    assert "train/loss/anchor" not in step


def test_constraint_under_the_name_of_another_term_is_refused(build):
    with pytest.raises(ValueError, match="got 'mixture'"):
        build(constraints={"mixture": ReferenceKL(0.1)})


def test_loss_is_the_sum_of_its_terms(build, data):
    module = build(mixture=GoldenMixture(0.3), constraints={"a": ReferenceKL(0.1), "b": ReferenceKL(0.2)})
    for step in fit(module, data(), steps=2).steps:
        terms = [step[f"train/loss/{name}"] for name in ("divergence", "mixture", "a", "b")]
        assert step["train/loss"] == pytest.approx(sum(terms))
    assert step["train/loss/b"] == pytest.approx(2 * step["train/loss/a"])
    assert step["train/value/b"] == pytest.approx(step["train/value/a"]) == pytest.approx(step["train/loss/b"] / 0.2)
    assert step["train/value/a"] > 0  # the student has left the reference in the first step


def test_length_inflation_follows_the_run(build, data):
    steps = fit(build(), data(), steps=3).steps
    lengths = [step["train/length_mean"] for step in steps]
    mean = [sum(lengths[: n + 1]) / (n + 1) for n in range(3)]
    assert [step["train/length_inflation"] for step in steps] == pytest.approx(
        [length / base for length, base in zip(lengths, mean, strict=True)]
    )


def test_same_seed_gives_the_same_run_and_another_seed_another(build, data, monkeypatch):
    def run(seed):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        module = build()
        return fit(module, data()).steps, weights(module)

    (first, first_weights), (again, again_weights), (other, _) = run(0), run(0), run(1)
    assert_same_weights(again_weights, first_weights, rtol=0, atol=0)
    assert [step["train/loss"] for step in first] == [step["train/loss"] for step in again]
    assert [step["train/loss"] for step in first] != [step["train/loss"] for step in other]


def test_evaluation_does_not_change_the_training(build, data, validation_path):
    runs = []
    for validation in (None, validation_path):
        module = build(mixture=GoldenMixture())
        fit(module, data(validation=validation), steps=3, val_check_interval=1)
        runs.append(weights(module))
    assert_same_weights(runs[1], runs[0], rtol=0, atol=0)


def greedy_answers(model, records):
    answers = []
    for record in records:
        ids = torch.tensor([TOKENIZER.encode(record["prompt"])])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=BUDGET, pad_token_id=0
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def decode(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def test_validation_measures_the_students_own_greedy_answers(build, data, tmp_path):
    """The right answer of two examples in six is what the student says; transformers' generate is the second source."""
    records = problems(6, seed=1)
    answers = greedy_answers(tiny_model(1), records)
    for number, record in enumerate(records):
        record["answer"] = decode(answers[number]) if number in (1, 4) else "something else"
    path = write_jsonl(tmp_path / "v.jsonl", records)
    source = data(train=None, validation=path, task=ExactMatch(marker=""), eval_batch_size=4)
    (figures,) = make_trainer().validate(build(), datamodule=source, verbose=False)
    assert figures["val/accuracy"] == pytest.approx(2 / 6)
    assert figures["val/length_mean"] == pytest.approx(sum(map(len, answers)) / 6)
    assert figures["val/truncation_rate"] == pytest.approx(sum(row[-1] != EOS for row in answers) / 6)
    assert {f"val/sampled/{name}" for name in ("accuracy", "truncation_rate", "repetition_rate", "length_mean")} <= set(
        figures
    )


def test_test_logs_the_same_under_its_own_name(build, data, validation_path):
    make = lambda: data(train=None, validation=validation_path, task=ExactMatch())  # noqa: E731
    (validated,) = make_trainer().validate(build(), datamodule=make(), verbose=False)
    (tested,) = make_trainer().test(build(), datamodule=make(), verbose=False)
    assert tested == {name.replace("val/", "test/"): value for name, value in validated.items()}


def test_without_a_task_everything_but_accuracy_is_measured(build, data, validation_path):
    (figures,) = make_trainer().validate(
        build(), datamodule=data(train=None, validation=validation_path), verbose=False
    )
    assert "val/length_mean" in figures
    assert not any("accuracy" in name for name in figures)


def test_predictions_are_greedy_answers_with_their_examples(build, data, tmp_path):
    records = problems(5, seed=2)
    answers = greedy_answers(tiny_model(1), records)
    records[3]["answer"] = decode(answers[3])
    path = write_jsonl(tmp_path / "v.jsonl", records)
    source = data(train=None, validation=path, task=ExactMatch(marker=""), eval_batch_size=2)
    batches = make_trainer().predict(build(), datamodule=source)
    found = [record for batch in batches for record in batch]
    assert len(found) == 5
    for number, (answer, record) in enumerate(zip(found, records, strict=True)):
        assert {name: answer[name] for name in record} == record
        assert answer["completion"] == decode(answers[number])
        assert answer["tokens"] == len(answers[number])
        assert answer["truncated"] == (answers[number][-1] != EOS)
        assert answer["index"] == number
        assert answer["grade"] == float(number == 3)


def test_predictions_without_a_task_have_no_grade(build, data, validation_path):
    batches = make_trainer().predict(build(), datamodule=data(train=None, validation=validation_path))
    assert all("grade" not in record for batch in batches for record in batch)


def test_evaluation_loads_neither_teacher_nor_reference(build, data, validation_path):
    """A student can be evaluated where its teacher is not."""
    module = build(teacher="no-such-teacher", constraints={"anchor": ReferenceKL(0.1)})
    make_trainer().validate(module, datamodule=data(train=None, validation=validation_path), verbose=False)
    assert module.readers.reference is None


def test_state_holds_the_student_and_neither_teacher_nor_reference(build, data):
    module = build(constraints={"anchor": ReferenceKL(0.1)})
    fit(module, data(), steps=1)
    assert module.readers.reference is not None
    state = module.state_dict()
    assert {name.partition(".")[0] for name in state} <= {"student", "report", "skips"}
    student = {name.removeprefix("student.") for name in state if name.startswith("student.")}
    assert student == set(tiny_model(1).state_dict())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert trained == sum(parameter.numel() for parameter in tiny_model(1).parameters())


def test_reference_and_teacher_stay_as_they_were(build, data):
    module = build(constraints={"anchor": ReferenceKL(0.1)}, mixture=GoldenMixture())
    fit(module, data(), steps=2)
    for model, seed in ((module.readers.reference, 1), (module.readers.teacher.model, 2)):
        assert_same_weights(dict(model.named_parameters()), dict(tiny_model(seed).named_parameters()), rtol=0, atol=0)


def test_without_a_term_that_needs_it_there_is_no_reference(build, data):
    module = build()
    fit(module, data(), steps=1)
    assert module.readers.reference is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_runs_near_float32(precision, build, data):
    """The first step's figures; rollouts may differ in later ones, because a token was drawn otherwise."""
    figures = []
    for each in ("32-true", precision):
        module = build(mixture=GoldenMixture(), constraints={"anchor": ReferenceKL(0.1)}, samples=4)
        steps = fit(module, data(batch_size=8), steps=2, precision=each).steps
        assert all(math.isfinite(step[name]) for step in steps for name in ("train/loss", "train/grad_norm"))
        figures.append(steps[0])
    assert figures[1]["train/value/mixture"] == pytest.approx(figures[0]["train/value/mixture"], rel=0.02)
    assert figures[1]["train/entropy_student"] == pytest.approx(figures[0]["train/entropy_student"], rel=0.1)
    dtypes = {parameter.dtype for parameter in module.model.parameters()}
    assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_figures_are_counted_exactly_when_the_module_is_cast_to_bfloat16(build):
    """As precision "bf16-true" does; 256 + 1 is 256 in bfloat16."""
    metrics = build().to(torch.bfloat16).report.metrics
    for flag, length in ((True, 1), (False, 3)):
        for _ in range(300):
            metrics["truncation_rate"].update(torch.tensor([flag]))
            metrics["length"].update(torch.tensor([length]))
    assert metrics["truncation_rate"].compute().item() == pytest.approx(0.5)
    assert metrics["length"].compute()["length_mean"].item() == pytest.approx(2.0)


def test_model_before_setup_says_what_to_do(build):
    with pytest.raises(RuntimeError, match="start a Trainer"):
        _ = build().model


def test_golden_mixture_without_golden_text_is_refused(build, data, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"prompt": each["prompt"]} for each in problems(8)])
    with pytest.raises(ValueError, match=r"needs a golden solution for every prompt.*data\.columns\.golden"):
        fit(build(mixture=GoldenMixture()), data(train=path))


def test_budget_that_is_longer_than_the_context_is_refused_before_the_first_step(build, data):
    longest = max(len(TOKENIZER.encode(record["prompt"])) for record in problems(24))
    module = build(rollout=RolloutOptions(max_new_tokens=96 - longest + 1))
    with pytest.raises(ValueError, match=rf"student reads at most 96 .*max_new_tokens to {96 - longest} or less"):
        fit(module, data())


def test_budget_that_just_fits_is_accepted(build, data):
    longest = max(len(TOKENIZER.encode(record["prompt"])) for record in problems(24))
    module = build(rollout=RolloutOptions(samples_per_prompt=1, max_new_tokens=96 - longest))
    assert fit(module, data(batch_size=24), steps=1).steps[0]["train/length_max"] > BUDGET


def test_teacher_with_a_shorter_context_is_refused_by_name(build, data, tmp_path):
    short = save(tiny_model(2, max_position_embeddings=15), tmp_path)
    with pytest.raises(ValueError, match="teacher reads at most 15"):
        fit(build(teacher=short), data())


def test_teacher_with_another_vocabulary_is_refused_before_the_first_step(build, data, tmp_path):
    other = save(tiny_model(2), tmp_path)
    words = tmp_path / "tokenizer.json"
    words.write_text(words.read_text().replace('"#"', '"&"'))
    with pytest.raises(ValueError, match=r"1 tokens are known to the teacher only.*'&'"):
        fit(build(teacher=other), data())


def test_no_rollouts_and_no_mixture_is_refused_with_a_way_out(build, data):
    """There would be no row to learn from."""
    with pytest.raises(ValueError, match="samples_per_prompt"):
        fit(build(samples=0), data())


def test_student_padded_to_a_larger_vocabulary_writes_only_what_its_tokenizer_knows(build, data, tmp_path):
    """Model families pad the embedding (151936 rows for 151669 tokens in Qwen3); such a token has no text."""
    padded = save(tiny_model(1, vocab_size=VOCABULARY + 40), tmp_path)
    (step,) = fit(build(student=padded), data(), steps=1).steps
    assert math.isfinite(step["train/loss"])


def test_student_that_was_saved_in_bfloat16_learns_in_float32(build, data, tmp_path):
    """At the learning rates of distillation an update of a bfloat16 weight rounds to nothing."""
    student = save(tiny_model(1).to(torch.bfloat16), tmp_path)
    module = build(student=student, optimizer=partial(torch.optim.SGD, lr=1e-7))
    fit(module, data(), steps=1)
    assert {parameter.dtype for parameter in module.model.parameters()} == {torch.float32}
    assert any(
        (weight != tiny_model(1).to(torch.bfloat16).state_dict()[name].float()).any()
        for name, weight in module.model.state_dict().items()
    )


def test_figures_of_past_steps_are_forgotten(build, data):
    """But for the inflation, whose yardstick is the first steps."""
    module = build()
    fit(module, data(), steps=3)
    metrics = module.report.metrics
    assert metrics["log_ratio_p99"].gaps == []
    assert metrics["truncation_rate"].rows == 0
    assert metrics["length_inflation"].steps == 3


def test_every_training_example_must_have_the_golden_solution_that_the_mixture_needs(build, data, tmp_path):
    """Even those that would be drawn late."""
    records = [*problems(8), {**problems(9)[8], "golden": None}]
    path = write_jsonl(tmp_path / "t.jsonl", records)
    with pytest.raises(ValueError, match=r"GoldenMixture needs .* but 1 of 9 training examples have none"):
        fit(build(mixture=GoldenMixture()), data(train=path), steps=1)


class Witness(Recorder):
    """Logs a figure of its own in every step, by Lightning's means, and keeps what each step leaves for callbacks."""

    def __init__(self):
        super().__init__()
        self.monitored = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer)
        self.monitored.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        pl_module.log("witness", float(trainer.global_step))


def read_columns(folder):
    """Of each column of metrics.csv, its values by the step."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: {int(row["step"]): float(row[name]) for row in rows if row[name]} for name in rows[0]}


@pytest.mark.parametrize(("every", "logged"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2])])
def test_figures_of_a_step_go_where_those_of_lightning_go(every, logged, build, data, tmp_path):
    """To callbacks in every step; to the loggers in every so many, under the index of the step."""
    witness = Witness()
    logger = CSVLogger(tmp_path, name="", version="")
    fit_options = {"max_steps": 5, "logger": logger, "log_every_n_steps": every}
    make_trainer(witness, **fit_options).fit(build(mixture=GoldenMixture()), datamodule=data(batch_size=6))
    columns = read_columns(tmp_path)
    assert list(columns["witness"]) == logged
    figures = {name for name in witness.steps[0] if name.partition("/")[0] in ("train", "time", "throughput")}
    assert {"train/loss", "train/loss/mixture", "train/grad_norm", "time/update", "train/length_mean"} <= figures
    assert set(columns) == figures | {"witness", "epoch", "step"}
    assert len(witness.steps) == len(witness.monitored) == 5
    for name in figures:
        seen = [step[name] for step in witness.steps]
        assert [step[name] for step in witness.monitored] == pytest.approx(seen, nan_ok=True)
        assert columns[name] == pytest.approx({step: seen[step] for step in logged}, nan_ok=True)


def test_every_logged_value_is_finite(build, data, tmp_path):
    """But for a mean over no token, which is nan: where nothing is repeated, and where everything is."""
    module = build(samples=4, mixture=GoldenMixture(), constraints={"anchor": ReferenceKL(0.1)})
    logger = CSVLogger(tmp_path, name="", version="")
    make_trainer(max_steps=5, logger=logger, log_every_n_steps=1).fit(module, datamodule=data(batch_size=6))
    columns = read_columns(tmp_path)
    assert columns["epoch"] == {0: 0, 1: 0, 2: 0, 3: 0, 4: 1}
    for name, values in columns.items():
        nothing_repeats = {"train/advantage_repeated": 0, "train/repetition_onset": 0}
        excused = (nothing_repeats | {"train/advantage_regular": 1}).get(name)
        assert len(values) == 5
        for step, value in values.items():
            assert math.isfinite(value) or columns["train/repeated_share"][step] == excused, name


def test_checkpoints_are_chosen_by_a_figure_of_the_step(build, data, validation_path, tmp_path):
    """Also with evaluations in between."""
    keep = ModelCheckpoint(tmp_path, "{step}", monitor="train/loss", every_n_train_steps=1, save_top_k=1)
    recorder = Recorder()
    trainer = make_trainer(recorder, keep, max_steps=5, enable_checkpointing=True, val_check_interval=2)
    trainer.fit(build(mixture=GoldenMixture()), datamodule=data(validation=validation_path))
    losses = [step["train/loss"] for step in recorder.steps]
    best = min(range(5), key=losses.__getitem__)
    assert keep.best_model_score.item() == pytest.approx(losses[best])
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={best + 1}.ckpt"]

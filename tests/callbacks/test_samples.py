import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from helpers import TOKENIZER, make_trainer
from stable_opd import ExactMatch, LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, ReverseKL, StudentOnly
from stable_opd.callbacks.samples import LONGEST, RolloutSamples
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet, Source
from stable_opd.types import Prompts


def read(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def fit(paths, folder, callback, max_steps, ckpt_path=None, **options):
    student, teacher, train, validation = paths
    module = OPDModule(
        student,
        LocalTeacher(teacher),
        ReverseKL(),
        StudentOnly(),
        PeriodicSuffix(max_period=4, min_tokens=3),
        rollout=RolloutOptions(samples_per_prompt=1, max_new_tokens=8),
    )
    data = PromptDataModule(Source(train), EvaluationSet(validation), ExactMatch(), batch_size=8, eval_batch_size=4)
    logger = CSVLogger(folder, name="", version="")
    trainer = make_trainer(
        callback, max_steps=max_steps, val_check_interval=1, log_every_n_steps=1, logger=logger, **options
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def paths(student_path, teacher_path, train_path, validation_path):
    return student_path, teacher_path, train_path, validation_path


def test_each_evaluation_of_a_training_leaves_its_first_answers(paths, tmp_path):
    """Five of the six prompts, in batches of four; the initial student first."""
    fit(paths, tmp_path, RolloutSamples(rows=5), 2, num_sanity_val_steps=-1)
    kept = read(tmp_path)
    assert [(each["step"], each["index"]) for each in kept] == [(step, row) for step in range(3) for row in range(5)]
    prompts = [json.loads(line)["prompt"] for line in Path(paths[3]).read_text(encoding="utf-8").splitlines()]
    for each in kept:
        assert " ".join(each["prompt"].split()) == " ".join(prompts[each["index"]].split())
        assert set(each) == {
            *("step", "prompt", "index", "completion", "grade", "truncated", "repetitive", "repeated_from"),
        }
        assert each["repeated_from"] is None or 0 <= each["repeated_from"] <= len(each["completion"])


@pytest.mark.filterwarnings("ignore:.*not empty")
def test_a_resumed_run_writes_no_line_twice(paths, tmp_path):
    trainer = fit(paths, tmp_path, RolloutSamples(rows=2), 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    whole = fit(paths, tmp_path / "whole", RolloutSamples(rows=2), 4)
    assert whole.global_step == 4
    fit(paths, tmp_path, RolloutSamples(rows=2), 4)  # got to four, was lost, and goes on from two
    fit(paths, tmp_path, RolloutSamples(rows=2), 4, ckpt_path=tmp_path / "two.ckpt", num_sanity_val_steps=-1)
    steps = [each["step"] for each in read(tmp_path)]
    assert steps == sorted(steps)
    assert max(steps.count(step) for step in steps) == 2
    assert read(tmp_path) == read(tmp_path / "whole")


def stand_in(folder, step=3, fn=TrainerFn.FITTING, first=True):
    return SimpleNamespace(
        state=SimpleNamespace(fn=fn), is_global_zero=first, global_step=step, log_dir=folder and str(folder)
    )


MODULE = SimpleNamespace(tokenizer=TOKENIZER)


def evaluate(callback, trainer, *batches):
    callback.on_validation_epoch_start(trainer, MODULE)
    for number, answers in enumerate(batches):
        prompts = Prompts([[5]] * len(answers), [None] * len(answers), range(len(answers)), [{}] * len(answers))
        callback.on_validation_batch_end(trainer, MODULE, {"answers": answers}, prompts, number)
    callback.on_validation_epoch_end(trainer, MODULE)


def answer(text="a", **fields):
    return {"index": 0, "completion": text, "truncated": False, "repetitive": False, "repeated_from": None, **fields}


def test_only_so_many_rows_are_kept_over_all_batches(tmp_path):
    evaluate(RolloutSamples(3), stand_in(tmp_path), [answer("a"), answer("b")], [answer("c"), answer("d")], [answer()])
    assert [each["completion"] for each in read(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize("change", [{"first": False}, {"fn": TrainerFn.VALIDATING}, {"fn": TrainerFn.TESTING}])
def test_other_processes_and_other_commands_write_nothing(tmp_path, change):
    evaluate(RolloutSamples(), stand_in(tmp_path, **change), [answer()])
    assert not (tmp_path / "samples.jsonl").exists()


def test_every_process_asks_for_the_folder(tmp_path):
    """Lightning broadcasts it, so a process that did not ask would let the others wait for ever."""
    asked = []

    class Other:
        state, is_global_zero, global_step = SimpleNamespace(fn=TrainerFn.FITTING), False, 0

        @property
        def log_dir(self):
            asked.append(True)
            return str(tmp_path)

    evaluate(RolloutSamples(), Other(), [answer()])
    assert asked


def test_without_a_folder_nothing_is_written_and_nothing_piles_up():
    callback = RolloutSamples()
    for _ in range(3):
        evaluate(callback, stand_in(None), [answer()])
    assert len(callback._records) <= 1


def test_an_evaluation_is_written_once_and_later_steps_are_dropped(tmp_path):
    callback = RolloutSamples()
    for step, text in ((0, "a"), (10, "b"), (20, "c"), (10, "d")):
        evaluate(callback, stand_in(tmp_path, step), [answer(text)])
    assert [(each["step"], each["completion"]) for each in read(tmp_path)] == [(0, "a"), (10, "d")]


def test_what_a_crash_left_of_a_line_is_dropped(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "completion": "x"}\n{"step": 2, "compl')
    evaluate(RolloutSamples(), stand_in(tmp_path), [answer("y")])
    assert [each["completion"] for each in read(tmp_path)] == ["x", "y"]


def test_long_and_odd_texts_are_kept_within_bounds(tmp_path):
    evaluate(RolloutSamples(), stand_in(tmp_path), [answer("解\n\u2028\ud800"), answer("a" * 10**6)])
    odd, long = read_lines(tmp_path)
    assert odd["completion"].startswith("解\n\u2028")
    assert len(long["completion"]) == LONGEST + 1


def read_lines(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]


def test_a_module_that_returns_nothing_leaves_nothing(tmp_path):
    callback, trainer = RolloutSamples(), stand_in(tmp_path)
    for outputs in (None, {}, 3.0):
        callback.on_validation_batch_end(trainer, MODULE, outputs, None, 0)
    callback.on_validation_epoch_end(trainer, MODULE)
    assert not (tmp_path / "samples.jsonl").exists()


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="Expected rows of at least 1, but got 0"):
        RolloutSamples(0)

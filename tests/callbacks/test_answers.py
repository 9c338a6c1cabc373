import json

from helpers import make_trainer
from stable_opd import LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, ReverseKL, StudentOnly
from stable_opd.callbacks import AnswerWriter
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet


def predict(student_path, validation_path, writer):
    module = OPDModule(
        student_path,
        LocalTeacher("not needed"),
        ReverseKL(),
        StudentOnly(),
        PeriodicSuffix(),
        rollout=RolloutOptions(max_new_tokens=6),
    )
    data = PromptDataModule(validation=EvaluationSet(validation_path), eval_batch_size=4)
    return make_trainer(writer).predict(module, datamodule=data)


def test_every_answer_is_one_line_in_the_order_of_the_data(student_path, validation_path, tmp_path):
    path = tmp_path / "deep" / "answers.jsonl"
    batches = predict(student_path, validation_path, AnswerWriter(str(path)))
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        record for batch in batches for record in batch
    ]
    assert len(batches) == 2


def test_answers_of_an_earlier_run_do_not_stay(student_path, validation_path, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("an earlier run\n")
    predict(student_path, validation_path, AnswerWriter(str(path)))
    assert len(path.read_text().splitlines()) == 6
    assert "earlier" not in path.read_text()


def test_default_place_without_a_run_folder_is_here(student_path, validation_path, tmp_path, monkeypatch, log_text):
    monkeypatch.chdir(tmp_path)
    predict(student_path, validation_path, AnswerWriter())
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert f"Answers written to {tmp_path / 'answers.jsonl'}" in log_text()


def test_text_that_is_not_ascii_stays_readable(tmp_path):
    writer, trainer = AnswerWriter(str(tmp_path / "a.jsonl")), make_trainer()
    writer.on_predict_start(trainer, None)
    writer.write_on_batch_end(trainer, None, [{"completion": "naïve 解"}], None, None, 0, 0)
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8") == '{"completion": "naïve 解"}\n'

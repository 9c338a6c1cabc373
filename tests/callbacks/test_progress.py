import re

from helpers import make_trainer
from stable_opd import ExactMatch, LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, ReverseKL, StudentOnly
from stable_opd.callbacks import OPDProgressBar
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet, Source


def fit(paths, capsys, steps, **options):
    student, teacher, train, validation = paths
    module = OPDModule(
        student,
        LocalTeacher(teacher),
        ReverseKL(),
        StudentOnly(),
        PeriodicSuffix(),
        rollout=RolloutOptions(samples_per_prompt=1, max_new_tokens=6),
    )
    data = PromptDataModule(Source(train), EvaluationSet(validation), ExactMatch(), batch_size=8)
    trainer = make_trainer(OPDProgressBar(), max_steps=steps, enable_progress_bar=True, **options)
    capsys.readouterr()
    trainer.fit(module, datamodule=data)
    captured = capsys.readouterr()
    return trainer, captured.out + captured.err


def test_bar_counts_the_steps_of_the_run_over_all_epochs_and_shows_what_matters(
    student_path, teacher_path, train_path, validation_path, capsys
):
    """Five steps are one epoch of three and a part of the next."""
    paths = (student_path, teacher_path, train_path, validation_path)
    trainer, printed = fit(paths, capsys, steps=5, val_check_interval=1)
    last = [part for part in re.split(r"[\r\n]", printed) if "Step:" in part and "5/5" in part][-1]
    for figure in ("trunc=", "rep=", "len=", "acc=", "tok/s="):
        assert figure in last
    logged = trainer.callback_metrics
    assert f"trunc={float(logged['train/truncation_rate']):.2f}" in last
    assert f"len={float(logged['train/length_mean']):.0f}" in last
    assert f"acc={float(logged['val/accuracy']):.3f}" in last


def test_bar_shows_only_what_has_been_logged():
    trainer = make_trainer()
    assert OPDProgressBar().get_metrics(trainer, None) == {}

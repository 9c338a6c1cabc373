"""Terminal policies in a training: the testbed's pair whose stop tokens differ."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers import EOS, Recorder, make_trainer
from stable_opd import LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, SampledReverseKL, StudentOnly
from stable_opd.cli import main
from stable_opd.options import RolloutOptions
from stable_opd.sources import EvaluationSet, Source
from stable_opd.terminal import Baseline, SemanticClass, StopEvent, StopRule, TerminalPolicy, TwoStop

#: What the doctor says where the stop tokens are scored apart; these tests want to see what becomes of it.
pytestmark = pytest.mark.filterwarnings("ignore:The student ends an answer with")
CONFIG = str(Path(__file__).parents[1] / "configs" / "collapse.yaml")
OTHER = 19  # the student's stop token; the teacher ends with EOS
SMALL = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0", "--data.batch_size", "8"]
SMALL += ["--trainer.enable_progress_bar", "false", "--trainer.max_steps", "1"]
PAIR = ["--model.student", "testbed:student-other-stop", "--model.teacher.path", "testbed:control"]


def module_of(terminal=None, student="testbed:student-other-stop", teacher=None, lr=0.0):
    return OPDModule(
        student,
        teacher or LocalTeacher("testbed:control"),
        SampledReverseKL(),
        StudentOnly(),
        PeriodicSuffix(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0),
        terminal=terminal,
        rollout=RolloutOptions(max_new_tokens=48),
    )


def data():
    return PromptDataModule(Source("testbed:train"), EvaluationSet("testbed:validation"), batch_size=16)


def fit(module, *callbacks, steps=1, path=None, **options):
    make_trainer(*callbacks, max_steps=steps, limit_val_batches=0, **options).fit(
        module, datamodule=data(), ckpt_path=path
    )
    return module


def first_step(terminal):
    recorder = Recorder()
    fit(module_of(terminal), recorder)
    return recorder.steps[0]


def test_it_is_the_token_that_is_punished_and_not_the_stop():
    """The masses are those of the union under every policy; they tell this failure from the one of the loops."""
    baseline, semantic = first_step(Baseline()), first_step(SemanticClass())
    for logged in (baseline, semantic):
        assert logged["train/stop_mass_teacher"] > 0.9
        assert logged["train/stop_mass_student"] > 0.9
        assert logged["train/truncation_rate"] == 0
    # One token in some twenty has a log-ratio of about -10 instead of about 0.
    assert semantic["train/advantage_mean"] - baseline["train/advantage_mean"] == pytest.approx(10 / 21, rel=0.4)


def stop_probability(module):
    """Mean probability of any stop token where golden solutions end."""
    found = []
    for example in data_of(module)[:40]:
        with torch.no_grad():
            logits = module.model(torch.tensor([[*example.ids, *example.golden[:-1]]])).logits[0, -1]
        found.append(logits.softmax(-1)[[OTHER, EOS]].sum())
    return torch.stack(found).mean().item()


def data_of(module):
    return module.trainer.datamodule.examples["train"]


def test_student_unlearns_to_stop_unless_stopping_is_one_event():
    """The first steps of what the benchmark shows to the end."""
    trained = {policy: fit(module_of(policy, lr=1e-3), steps=12) for policy in (Baseline(), SemanticClass())}
    baseline, semantic = map(stop_probability, trained.values())
    assert baseline < 0.9
    assert semantic > 0.97


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            PAIR,
            r"student ends its answers with <pad> \(19\), the teacher with <eos> \(18\)\. .* is SemanticClass: ",
        ),
        ([*PAIR, "--model.terminal", "TwoStop"], "is TwoStop: Any terminal id ends a row"),
        ([*PAIR, "--model.terminal", "my_policies.Quiet"], "is Quiet: Nothing is said"),
        ([], None),
    ],
    ids=["default", "by name", "of a third party", "same stop token"],
)
def test_policy_is_chosen_on_the_command_line_and_said(flags, said, log_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_policies.py").write_text(
        "from stable_opd import TerminalPolicy\n"
        "from stable_opd.terminal import StopRule\n\n"
        "class Quiet(TerminalPolicy):\n"
        '    """Nothing is said."""\n\n'
        "    def rule(self, ids):\n"
        "        return StopRule(ids.union)\n"
    )
    main(["fit", "-c", CONFIG, *flags, *SMALL])
    assert ("ends its answers with" in log_text()) == (said is not None)
    assert said is None or re.search(said, log_text())
    (metrics,) = Path("runs").rglob("metrics.csv")
    assert pd.read_csv(metrics)["train/stop_mass_teacher"].iloc[0] > 0.9


def test_equal_stop_tokens_cost_nothing():
    module = fit(module_of(student="testbed:student"))
    assert module.stop_rule == StopRule((EOS,))


def test_teacher_that_does_not_say_is_taken_to_end_as_the_student_does():
    class Silent(LocalTeacher):
        """Does not say."""

        @property
        def stop_ids(self):
            return None

    assert fit(module_of(teacher=Silent("testbed:control"))).stop_rule.stop == (OTHER,)


def test_checkpoint_is_evaluated_with_the_stop_tokens_it_was_trained_with(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last")
    assert fit(module_of(TwoStop()), keep, enable_checkpointing=True).stop_rule.stop == (OTHER, EOS)
    fresh, validation = module_of(), {"datamodule": data(), "verbose": False}
    make_trainer(limit_val_batches=1).validate(fresh, **validation)
    assert fresh.stop_rule.stop == (OTHER,)
    trainer = make_trainer(keep, limit_val_batches=1, enable_checkpointing=True)
    trainer.validate(fresh, ckpt_path=str(tmp_path / "last.ckpt"), **validation)
    assert fresh.stop_rule == StopRule((OTHER, EOS))  # no event: it draws as `generate` would


def test_resumed_training_has_the_policy_that_is_configured(tmp_path):
    keep = ModelCheckpoint(tmp_path, "last")
    fit(module_of(SemanticClass()), keep, enable_checkpointing=True)
    path = str(tmp_path / "last.ckpt")
    again = ModelCheckpoint(tmp_path / "again", "last")
    module = fit(module_of(Baseline()), again, steps=2, path=path, enable_checkpointing=True)
    assert module.stop_rule.stop == (OTHER,)


def test_policy_reaches_rollouts_and_readings():
    """A policy of one's own, that reads two words of the task as one."""

    class Words(TerminalPolicy):
        """The words 16 and 17 are one."""

        def rule(self, ids):
            event = StopEvent(16, (17,))
            return StopRule(ids.student, event, event)

    class Reading(SampledReverseKL):
        """Keeps what it was shown."""

        def forward(self, evidence):
            self.seen = evidence
            return super().forward(evidence)

    module = module_of(Words(), student="testbed:student")
    module.divergence = Reading()
    fit(module)
    evidence = module.divergence.seen
    assert (evidence.tokens == 16).any()
    assert not (evidence.tokens == 17).any()
    gap = evidence.student.sampled.detach() - evidence.behaviour_logprobs
    assert gap.abs().max() < 1e-4

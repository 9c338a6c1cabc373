"""Every weighting in training: alone, together, through YAML, over a stop, and on two processes."""

import csv
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import stable_opd.weightings
from helpers import EOS, Recorder, make_trainer, tiny_model, weights
from stable_opd import (
    GoldenMixture,
    Linear,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReverseKL,
    StudentOnly,
    TopP,
)
from stable_opd.cli import main
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.policies import Policies
from stable_opd.registry import components
from stable_opd.resume import newest
from stable_opd.sources import Source
from stable_opd.weightings import (
    AgreementCut,
    PositionWeight,
    PrefixHorizon,
    RatioMask,
    SpecialTokens,
    TokenSelection,
)

CUT = {"window": 2, "patience": 1, "samples": 4, "warm_up": 1, "memory": 20}
WEIGHTINGS = {
    "PositionWeight": partial(PositionWeight, 3.0),
    "PrefixHorizon": lambda: PrefixHorizon(6, Linear(0.5, 1.0)),
    "TokenSelection": TokenSelection,
    "AgreementCut": lambda: AgreementCut(**CUT),
    "SpecialTokens": lambda: SpecialTokens([2, 3, 4, EOS], None),
    "RatioMask": lambda: RatioMask(0.0179),  # no token's ratio is near it, so rounding changes no mask
}
ALL = [*WEIGHTINGS, "all"]
START = dict(tiny_model(1).named_parameters())


def chosen(name):
    return {each.lower(): build() for each, build in WEIGHTINGS.items() if name in (each, "all")}


def test_all_that_there_are_are_tested():
    assert set(components("weighting")) == set(WEIGHTINGS) == set(stable_opd.weightings.__all__) - {"Weighting"}


@pytest.fixture
def build(student_path, teacher_path):
    """Make a small module; a sampler that changes the odds gives `RatioMask` something to mask."""

    def build(weighting, tokens=16_384, mixture=None, teacher=teacher_path, policies=Policies()):
        return OPDModule(
            student_path,
            LocalTeacher(teacher),
            ReverseKL(),
            mixture or StudentOnly(),
            PeriodicSuffix(4, 3, 3),
            sampler=TopP(0.8),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            weighting=weighting,
            rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=10),
            policies=policies,
            update=UpdateOptions(micro_batch_tokens=tokens),
        )

    return build


@pytest.fixture
def fit(train_path):
    def fit(module, *callbacks, steps=2, **options):
        recorder, path = Recorder(), options.pop("ckpt_path", None)
        trainer = make_trainer(recorder, *callbacks, max_steps=steps, **options)
        trainer.fit(module, datamodule=PromptDataModule(Source(train_path), batch_size=6), ckpt_path=path)
        return weights(module), recorder.steps

    return fit


def difference(found, expected):
    return max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())


@pytest.mark.parametrize("name", ALL)
def test_two_steps_that_micro_batches_do_not_change(name, build, fit):
    found, steps = fit(build(chosen(name), mixture=GoldenMixture()))
    parts, other = fit(build(chosen(name), 40, GoldenMixture()))
    plain, _ = fit(build(None, mixture=GoldenMixture()))
    assert difference(found, parts) < 2e-5
    assert [step["train/loss"] for step in other] == pytest.approx([step["train/loss"] for step in steps], rel=1e-4)
    assert difference(found, START) > 1e-3
    assert difference(found, plain) > 1e-4


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ALL)
def test_lower_precision(name, precision, build, fit):
    found, steps = fit(build(chosen(name)), precision=precision)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert all(step["train/grad_norm"] > 0 for step in steps)


def test_weighting_that_is_null_is_switched_off(build, fit):
    plain, _ = fit(build(None))
    assert difference(fit(build({"early": None}))[0], plain) == 0


def test_several_are_multiplied_with_the_policies(build, fit):
    """What one masks, no other brings back."""
    policies = Policies(truncated="last_window", window=4)
    both, _ = fit(build(chosen("PrefixHorizon") | chosen("SpecialTokens"), policies=policies))
    for name in ("PrefixHorizon", "SpecialTokens"):
        assert difference(both, fit(build(chosen(name), policies=policies))[0]) > 1e-4
    assert difference(both, fit(build(chosen("PrefixHorizon") | chosen("SpecialTokens")))[0]) > 1e-4


def test_a_resumed_cut_goes_on_with_its_memory(build, fit, tmp_path):
    """Bit for bit; with an empty memory the first steps would cut nothing."""

    def keep(folder):
        return ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)

    expected, _ = fit(build(chosen("AgreementCut")), keep("through"), steps=4, enable_checkpointing=True)
    path = str(tmp_path / "through" / "step=2.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state["weighting.agreementcut._extra_state"][0] == 2
    resumed = build(chosen("AgreementCut"))
    found, _ = fit(resumed, keep("resumed"), steps=4, enable_checkpointing=True, ckpt_path=path)
    assert difference(found, expected) == 0
    assert resumed.weighting["agreementcut"].steps == 4


@pytest.fixture
def recipe(student_path, teacher_path, train_path, validation_path, tmp_path, monkeypatch):
    """A YAML with several weightings and policies."""
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {
            "student": student_path,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
            "divergence": "ReverseKL",
            "mixture": "GoldenMixture",
            "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
            "constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": {"weight": 0.1}}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 10},
            "weighting": {
                "early": {"class_path": "PositionWeight", "init_args": {"largest": 1.25}},
                "horizon": {
                    "class_path": "PrefixHorizon",
                    "init_args": {"horizon": 9, "schedule": {"class_path": "Linear", "init_args": {"start": 0.5}}},
                },
                "pick": "TokenSelection",
                "trap": {"class_path": "AgreementCut", "init_args": CUT},
                "tags": {"class_path": "SpecialTokens", "init_args": {"tokens": [5, 6]}},
                "off": None,
            },
            "policies": {"loops": "mask", "truncated": "down_weight", "factor": 0.5},
            "update": {"micro_batch_tokens": 100},
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {"train": {"path": train_path}, "validation": {"path": validation_path}},
        },
        "trainer": {"max_steps": 3, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def outcome(version):
    folder = Path(f"runs/opd/version_{version}")
    state = torch.load(newest(folder / "checkpoints"), weights_only=True)["state_dict"]
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    return {name: tensor for name, tensor in state.items() if not name.startswith("report")}, losses


def test_yaml_is_recorded_and_repeats_the_run(recipe):
    main(["fit", "-c", "recipe.yaml", "--data.batch_size", "8"])
    config = yaml.safe_load(Path("runs/opd/version_0/config.yaml").read_text())["model"]
    assert config["weighting"]["early"]["init_args"] == {"largest": 1.25}
    assert config["weighting"]["pick"]["init_args"] == {"share": 0.5}
    assert config["weighting"]["trap"]["init_args"] == CUT | {"eta": 0.3}
    assert config["weighting"]["tags"]["init_args"] == {"tokens": [5, 6], "first": 1, "mask_end": False}
    assert config["weighting"]["off"] is None
    assert config["policies"] == {"loops": "mask", "truncated": "down_weight", "factor": 0.5, "window": 256}
    main(["fit", "-c", "runs/opd/version_0/config.yaml"])
    (expected, losses), (found, other) = outcome(0), outcome(1)
    assert other == losses
    assert found.keys() == expected.keys() >= {"weighting.trap._extra_state"}
    assert difference(found, expected) == 0


def test_wrong_argument_in_yaml_is_refused_with_its_reason(recipe, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        main(["fit", "-c", "recipe.yaml", "--model.weighting.pick.init_args.share", "50"])
    assert "Expected share above 0 and at most 1, but got 50" in capsys.readouterr().err + str(error.value)


def test_list_shows_the_weightings(capsys):
    main(["list", "weighting"])
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(maxsplit=1) for line in lines[1:])
    assert set(found) == set(WEIGHTINGS)
    assert all(line.endswith(".") for line in found.values())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_docstring_names_source_and_arguments(name):
    text = components("weighting")[name].__doc__
    assert "\n    Source: " in text
    assert "\n    Args:\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_two_processes_equal_one_on_the_same_data(aggregation, recipe):
    """The student and the memory of the cut."""
    options = ["-c", "recipe.yaml", "--model.update.aggregation", aggregation]
    main(["fit", *options, "--data.batch_size", "8"])
    two = ["--data.batch_size", "4", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "stable_opd", "fit", *options, *two],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (expected, losses), (found, other) = outcome(0), outcome(1)
    assert other == pytest.approx(losses, rel=1e-4, abs=1e-6)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert len(expected["weighting.trap._extra_state"]) > CUT["samples"]

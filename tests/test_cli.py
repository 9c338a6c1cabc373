"""The command line, in this process: `main([...])` is what a shell would call."""

import csv
import json
import os
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml

from helpers import EOS, TOKENIZER, make_trainer, problems, save, tiny_model, write_jsonl
from stable_opd.cli import main
from stable_opd.resume import checkpoints

TRAIN_KEYS = {
    "train/loss",
    "train/loss/divergence",
    "train/loss/mixture",
    "train/loss/anchor",
    "train/value/divergence",
    "train/value/mixture",
    "train/value/anchor",
    "train/length_mean",
    "train/length_p95",
    "train/length_inflation",
    "train/truncation_rate",
    "train/repetition_rate",
    "train/repeated_share",
    "train/advantage_repeated",
    "train/advantage_regular",
    "train/advantage_mean",
    "train/log_ratio_p99",
    "train/entropy_student",
    "train/entropy_teacher",
    "train/overlap",
    "train/grad_norm",
    "time/rollout",
    "time/score",
    "time/update",
    "throughput/rollout_tokens_per_s",
}
VAL_KEYS = {"val/accuracy", "val/truncation_rate", "val/repetition_rate", "val/length_mean"}


@pytest.fixture
def recipe(student_path, teacher_path, train_path, validation_path, tmp_path, monkeypatch):
    """Write a YAML with some departures from a small recipe, go to an empty folder, and return the YAML's path."""
    monkeypatch.chdir(tmp_path)

    def recipe(name="recipe.yaml", **departures):
        config = {
            "model": {
                "student": student_path,
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
                "divergence": "SampledReverseKL",
                "mixture": "GoldenMixture",
                "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
                "constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": {"weight": 0.1}}},
                "rollout": {"samples_per_prompt": 2, "max_new_tokens": 10},
            },
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {
                    "train": {"path": train_path},
                    "validation": {"path": validation_path},
                    "task": "ModularChains",
                    "batch_size": 8,
                },
            },
            "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
        }
        for section, changes in departures.items():
            _merge(config[section], changes)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return recipe


def _merge(config, changes):
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(config.get(name), dict):
            _merge(config[name], value)
        else:
            config[name] = value


def read_metrics(folder="runs/opd/version_0"):
    with (Path(folder) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def checkpoint(folder="runs/opd/version_0"):
    return str(checkpoints(Path(folder) / "checkpoints")[0])


def student_of(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("student.")}


def refusal(capsys, *args):
    """What a user reads when a command is refused: the parser's words, or an exception's."""
    capsys.readouterr()
    with pytest.raises((SystemExit, ValueError)) as error:
        main(list(args))
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2
        return capsys.readouterr().err
    return str(error.value)


def test_fit_leaves_config_metrics_and_checkpoint(recipe):
    main(["fit", "-c", recipe(trainer={"val_check_interval": 1})])
    folder = Path("runs/opd/version_0")
    rows = read_metrics()
    assert set(rows[0]) >= TRAIN_KEYS | VAL_KEYS
    trained = [row for row in rows if row["train/loss"]]
    validated = [row for row in rows if row["val/accuracy"]]
    assert len(trained) == 2
    assert len(validated) >= 2
    for row in trained:
        assert all(row[name] for name in TRAIN_KEYS)
    for row in validated:
        assert all(row[name] for name in VAL_KEYS)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["constraints"]["anchor"]["init_args"]["weight"] == 0.1
    assert config["model"]["divergence"]["init_args"]["clip"] == 0.2  # defaults are on record too
    start = tiny_model(1).state_dict()
    moved = student_of(checkpoint())
    assert {name.removeprefix("student.") for name in moved} == set(start)
    assert any((moved[f"student.{name}"] != tensor).any() for name, tensor in start.items())


def test_config_of_a_run_repeats_the_run(recipe):
    main(["fit", "-c", recipe()])
    main(["fit", "-c", "runs/opd/version_0/config.yaml"])
    for name, tensor in student_of(checkpoint()).items():
        again = student_of(checkpoint("runs/opd/version_1"))[name]
        torch.testing.assert_close(again, tensor, rtol=0, atol=0)


def test_flags_win_over_the_recipe(recipe):
    main(
        [
            *("fit", "-c", recipe(), "--seed_everything", "3", "--trainer.max_steps", "1"),
            *("--model.divergence", "ReverseKL", "--model.constraints.anchor", "null", "--model.sampler", "TopP"),
            *("--model.sampler.p", "0.8", "--model.constraints.near", "ReferenceKL"),
            *("--model.constraints.near.weight", "0.5"),
        ]
    )
    config = yaml.safe_load(Path("runs/opd/version_0/config.yaml").read_text())
    assert config["seed_everything"] == 3
    assert config["model"]["divergence"].get("class_path", config["model"]["divergence"]).endswith(".ReverseKL")
    assert config["model"]["sampler"]["init_args"]["p"] == 0.8
    (row,) = [row for row in read_metrics() if row["train/loss"]]
    assert float(row["train/loss/near"]) == pytest.approx(0.5 * float(row["train/value/near"]), abs=1e-9)
    assert "train/loss/anchor" not in row


def test_command_is_the_main_function():
    (script,) = entry_points(group="console_scripts", name="stable-opd")
    assert script.load() is main


STEPWISE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"dirpath": "kept", "filename": "{step}", "every_n_train_steps": 1, "save_top_k": -1},
}
SCHEDULED = {
    "mixture": {"class_path": "GoldenMixture", "init_args": {"weight": 1.0, "schedule": "Linear"}},
    "lr_scheduler": {
        "class_path": "torch.optim.lr_scheduler.ExponentialLR",
        "init_args": {"gamma": 0.7},
    },
}


@pytest.fixture
def uninterrupted(recipe):
    """A run of 7 steps over epochs of 3, with a schedule and a learning rate that change all the time."""
    path = recipe(
        model=SCHEDULED,
        trainer={"max_steps": 7, "callbacks": [STEPWISE], "check_val_every_n_epoch": None, "val_check_interval": 2},
    )
    main(["fit", "-c", path])
    return path


def _trained_rows(folder):
    """The figures of each training step that do not depend on the clock."""
    return [
        {name: value for name, value in row.items() if name.startswith("train/")}
        for row in read_metrics(folder)
        if row["train/loss"]
    ]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(uninterrupted):
    """Stopped within the first epoch, at its end, and within the second."""
    expected = student_of("kept/step=7.ckpt")
    figures = _trained_rows("runs/opd/version_0")
    for version, stopped in enumerate((2, 3, 5), 1):
        callbacks = json.dumps([STEPWISE | {"init_args": STEPWISE["init_args"] | {"dirpath": f"resumed-{stopped}"}}])
        arguments = ["--ckpt_path", f"kept/step={stopped}.ckpt", "--trainer.callbacks", callbacks]
        main(["fit", "-c", uninterrupted, *arguments])
        found = student_of(f"resumed-{stopped}/step=7.ckpt")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=f"{name} after a stop at {stopped}")
        assert _trained_rows(f"runs/opd/version_{version}") == figures[stopped:]


def test_checkpoints_hold_the_student_and_plain_values_only(recipe):
    """No teacher, no reference; and nothing that has to be unpickled."""
    main(["fit", "-c", recipe()])
    state = torch.load(checkpoint(), weights_only=True)
    assert {name.partition(".")[0] for name in state["state_dict"]} <= {"student", "report", "skips"}
    assert Path(checkpoint()).stat().st_size < 4 * sum(4 * p.numel() for p in tiny_model(1).parameters())


def greedy(state):
    """Greedy answers of a student's weights to the validation prompts, by transformers' own generate."""
    model = tiny_model(1)
    model.load_state_dict({name.removeprefix("student."): tensor for name, tensor in state.items()})
    answers = []
    for problem in problems(6, seed=1):
        ids = torch.tensor([TOKENIZER.encode(problem["prompt"])])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0)
        answers.append(out[0, ids.shape[1] :])
    return answers


def test_predict_writes_the_answers_of_the_trained_student(recipe):
    path = recipe()
    main(["fit", "-c", path])
    main(["predict", "-c", path, "--ckpt_path", checkpoint()])
    (file,) = Path("runs").rglob("answers.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    answers = greedy(student_of(checkpoint()))
    assert [record["completion"] for record in records] == TOKENIZER.batch_decode(answers, skip_special_tokens=True)
    for record, problem in zip(records, problems(6, seed=1), strict=True):
        assert {name: record[name] for name in problem} == problem
        assert record["grade"] in (0.0, 1.0)
        assert isinstance(record["truncated"], bool)
        assert isinstance(record["repetitive"], bool)


@pytest.mark.parametrize(("command", "prefix"), [("validate", "val/"), ("test", "test/")])
def test_validate_and_test_log_the_figures_of_a_checkpoint(command, prefix, recipe):
    path = recipe()
    main(["fit", "-c", path])
    main([command, "-c", path, "--ckpt_path", checkpoint()])
    (row,) = read_metrics("runs/opd/version_1")
    assert {name.replace("val/", prefix) for name in VAL_KEYS} <= set(row)
    answers = greedy(student_of(checkpoint()))
    assert float(row[f"{prefix}length_mean"]) == pytest.approx(sum(map(len, answers)) / 6)
    assert float(row[f"{prefix}truncation_rate"]) == pytest.approx(sum(EOS not in answer for answer in answers) / 6)


def test_evaluation_without_a_checkpoint_is_that_of_the_initial_student(recipe):
    main(["validate", "-c", recipe()])
    (row,) = read_metrics()
    answers = greedy(tiny_model(1).state_dict())
    assert float(row["val/length_mean"]) == pytest.approx(sum(map(len, answers)) / 6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_is_chosen_by_the_trainer(precision, recipe):
    main(["fit", "-c", recipe(), "--trainer.precision", precision])
    dtypes = {tensor.dtype for tensor in student_of(checkpoint()).values()}
    assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_tensorboard_is_chosen_in_yaml(recipe):
    pytest.importorskip("tensorboard")
    logger = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "boards"}}
    main(["fit", "-c", recipe(trainer={"logger": logger})])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = Path("boards").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert len(board.Scalars("train/truncation_rate")) == 2
    assert (events.parent / "config.yaml").exists()


def test_wandb_is_accepted_in_yaml(recipe, capsys):
    """Whether it is installed or not; without it nothing more can be tried."""
    logger = {"class_path": "lightning.pytorch.loggers.WandbLogger", "init_args": {"project": "opd"}}
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", recipe(trainer={"logger": logger}), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["logger"]["class_path"].endswith("WandbLogger")
    assert printed["trainer"]["logger"]["init_args"]["project"] == "opd"


MISSPELT = {
    "divergence flag": (["--model.divergence", "RevKL"], "ReverseKL"),
    "constraint flag": (["--model.constraints.anchor", "ReferenceK"], "ReferenceKL"),
    "sampler flag": (["--model.sampler", "Temprature"], "Temperature"),
    "component option": (["--model.divergence", "SampledReverseKL", "--model.divergence.clp", "0.1"], "clip"),
    "group option": (["--model.rollout.max_new_tokns", "3"], "max_new_tokens"),
    "trainer option": (["--trainer.max_stepz", "3"], "max_steps"),
    "data option": (["--data.bach_size", "3"], "batch_size"),
}


@pytest.mark.parametrize(("flags", "near"), MISSPELT.values(), ids=MISSPELT)
def test_misspelt_flag_gets_the_near_name(flags, near, recipe, capsys):
    path = recipe()
    with pytest.raises(SystemExit) as refused:
        main(["fit", "-c", path, *flags])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "Did you mean" in message
    assert near in message.partition("Did you mean")[2].partition("?")[0]
    assert "Traceback" not in message


MISSPELT_YAML = {
    "class": ({"model": {"divergence": "SampledReversKL"}}, "SampledReverseKL"),
    "class path": ({"model": {"mixture": {"class_path": "GoldMixture"}}}, "GoldenMixture"),
    "task": ({"data": {"init_args": {"task": "ModularChain"}}}, "ModularChains"),
    "component option": (
        {"model": {"constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": {"wieght": 1.0}}}}},
        "weight",
    ),
    "model option": ({"model": {"repetiton": "ZlibRepetition"}}, "repetition"),
    "group option": ({"model": {"rollout": {"sample_per_prompt": 3}}}, "samples_per_prompt"),
    "data option": ({"data": {"init_args": {"bach_size": 3}}}, "batch_size"),
    "trainer option": ({"trainer": {"max_step": 3}}, "max_steps"),
    "a name that is no word": ({"model": {"optimi:er": {"class_path": "torch.optim.SGD"}}}, "optimizer"),
}


@pytest.mark.parametrize(("changes", "near"), MISSPELT_YAML.values(), ids=MISSPELT_YAML)
def test_misspelt_key_in_yaml_gets_the_near_name(changes, near, recipe, capsys):
    path = recipe(**changes)
    with pytest.raises(SystemExit) as refused:
        main(["fit", "-c", path])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "Did you mean" in message
    assert near in message.partition("Did you mean")[2].partition("?")[0]
    assert "Traceback" not in message


def printed(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(list(args))
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_one_file_may_hold_the_settings_of_several_commands(recipe, capsys):
    settings = yaml.safe_load(Path(recipe()).read_text())
    Path("both.yaml").write_text(yaml.safe_dump({"fit": settings, "validate": settings}))
    assert printed(capsys, "--config", "both.yaml", "fit", "--print_config")["model"]["mixture"]


def test_a_recipe_may_come_through_a_pipe(recipe, capsys):
    text = Path(recipe()).read_bytes()
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file:
        file.write(text)  # less than a pipe holds
    try:
        assert printed(capsys, "fit", "-c", f"/dev/fd/{reading}", "--print_config")["model"]["mixture"]
    finally:
        os.close(reading)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["fitt"], "invalid choice: 'fitt'"),
        ([], "fit.*validate.*test.*predict"),
        (["fit", "-c", "no-such.yaml"], "no-such.yaml"),
        (["list", "divergance"], "'divergence'.*got 'divergance'"),
        (["list", "divergence", "RevKL"], "Did you mean 'ReverseKL'"),
    ],
    ids=["command", "no command", "no file", "kind", "component"],
)
def test_wrong_commands_are_refused_in_a_few_lines(args, what, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(args)
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) < 15
    assert what.partition(".*")[0] in message
    assert what.rpartition(".*")[2] in message


def test_wrong_type_of_value_is_refused(recipe, capsys):
    message = refusal(capsys, "fit", "-c", recipe(), "--model.rollout.samples_per_prompt", "many")
    assert "model.rollout.samples_per_prompt" in message
    assert "many" in message


WRONG = {
    "negative samples": (
        {"model": {"rollout": {"samples_per_prompt": -1}}},
        ["samples_per_prompt of at least 0", "-1"],
    ),
    "colliding constraint": (
        {"model": {"constraints": {"mixture": "ReferenceKL"}}},
        ["'mixture'", "choose another key"],
    ),
    "negative temperature": (
        {"model": {"sampler": {"class_path": "Temperature", "init_args": {"temperature": -1.0}}}},
        ["temperature of at least 0", "-1.0"],
    ),
    "budget beyond the context": (
        {"model": {"rollout": {"max_new_tokens": 95}}},
        ["reads at most 96", "max_new_tokens"],
    ),
    "batch beyond the data": ({"data": {"init_args": {"batch_size": 25}}}, ["takes 25 prompts", "only 24"]),
    "missing column": ({"data": {"init_args": {"columns": {"prompt": "question"}}}}, ["'question'", "'golden'"]),
    "no golden text": (
        {"data": {"init_args": {"columns": {"golden": "solution"}}}},
        ["golden solution for every prompt"],
    ),
    "no file": ({"data": {"init_args": {"train": {"path": "nowhere.jsonl"}}}}, ["'nowhere.jsonl'", ".parquet"]),
    "unknown testbed": ({"model": {"student": "testbed:pupil"}}, ["testbed:student", "testbed:pupil"]),
    "class of another kind": ({"model": {"divergence": "ReferenceKL"}}, ["no divergence named 'ReferenceKL'"]),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_refused_with_its_reason(changes, words, recipe, capsys):
    message = refusal(capsys, "fit", "-c", recipe(**changes))
    assert [word for word in words if word not in message] == []


def test_teacher_of_another_vocabulary_is_refused_with_what_differs(recipe, capsys, tmp_path):
    path = save(tiny_model(2), tmp_path / "other")
    words = tmp_path / "other" / "tokenizer.json"
    words.write_text(words.read_text().replace('"#"', '"&"'))
    message = refusal(capsys, "fit", "-c", recipe(model={"teacher": {"init_args": {"path": path}}}))
    assert "1 tokens are known to the teacher only (such as '&')" in message


def test_empty_training_file_is_refused(recipe, capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    message = refusal(capsys, "fit", "-c", recipe(data={"init_args": {"train": {"path": "empty.jsonl"}}}))
    assert "empty.jsonl" in message


def test_missing_required_parts_are_listed(capsys, student_path):
    message = refusal(capsys, "fit", "--model.student", student_path)
    for part in ("divergence", "mixture", "repetition"):
        assert part in message


def test_missing_teacher_is_refused(recipe, capsys):
    message = refusal(capsys, "fit", "-c", recipe(), "--model.teacher", "null")
    assert "Expected a teacher, because there are rows for it" in message
    assert "Set model.teacher;" in message


def test_list_shows_every_kind_with_its_members(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    for kind, member in {
        "sampler": "TopP",
        "divergence": "SampledReverseKL",
        "constraint": "ReferenceKL",
        "mixture": "GoldenMixture",
        "repetition": "ZlibRepetition",
        "engine": "TransformersEngine",
        "teacher": "LocalTeacher",
        "task": "ModularChains",
        "schedule": "Cosine",
    }.items():
        section = printed.partition(f"{kind}:\n")[2].partition("\n\n")[0]
        assert f"  {member} " in section, kind


def test_list_of_a_kind_shows_names_with_their_first_lines(capsys):
    main(["list", "divergence"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "divergence:"
    cells = [line.split(maxsplit=3) for line in lines[1:]]
    found = {name: first for name, _, _, first in cells}
    assert found["ReverseKL"] == "Reverse KL to the teacher, exact over the whole vocabulary."
    assert "SampledReverseKL" in found
    assert "ReferenceKL" not in found
    assert "AdvantageDivergence" not in found


def test_list_of_a_component_shows_its_parameters_and_its_documentation(capsys):
    main(["list", "constraint", "ReferenceKL"])
    printed = capsys.readouterr().out
    assert "ReferenceKL(weight: float = 0.005" in printed
    assert "weight * KL(p || p_0)" in printed


def test_list_of_a_component_without_parameters_shows_none(capsys):
    main(["list", "divergence", "ReverseKL"])
    assert "ReverseKL()" in capsys.readouterr().out.splitlines()[0]


def test_answers_can_be_written_elsewhere(recipe):
    writer = {"class_path": "stable_opd.callbacks.AnswerWriter", "init_args": {"path": "out/mine.jsonl"}}
    main(["predict", "-c", recipe(trainer={"callbacks": [writer]})])
    assert len(Path("out/mine.jsonl").read_text().splitlines()) == 6
    assert not list(Path().rglob("answers.jsonl"))


def test_a_wider_context_is_not_needed_for_evaluation_of_shorter_answers(recipe, tmp_path):
    """Evaluation looks at its own data: a long training prompt is no reason to refuse it."""
    long = write_jsonl(tmp_path / "long.jsonl", [{"prompt": "Q " + "1 + " * 60 + "1 ;", "golden": "# 1"}] * 8)
    main(["validate", "-c", recipe(data={"init_args": {"train": {"path": long}}})])
    assert read_metrics()


def test_trainer_of_python_and_of_the_command_line_agree(
    recipe, student_path, teacher_path, train_path, validation_path
):
    """The same parts composed in Python give the weights that the YAML gives."""
    from lightning.pytorch import seed_everything

    from stable_opd import (
        GoldenMixture,
        LocalTeacher,
        ModularChains,
        OPDModule,
        PeriodicSuffix,
        PromptDataModule,
        ReferenceKL,
        SampledReverseKL,
    )
    from stable_opd.options import RolloutOptions
    from stable_opd.sources import EvaluationSet, Source

    main(["fit", "-c", recipe()])
    seed_everything(0)
    module = OPDModule(
        student_path,
        LocalTeacher(teacher_path),
        SampledReverseKL(),
        GoldenMixture(),
        PeriodicSuffix(max_period=4, min_tokens=3),
        {"anchor": ReferenceKL(0.1)},
        rollout=RolloutOptions(2, 10),
    )
    data = PromptDataModule(Source(train_path), EvaluationSet(validation_path), ModularChains(), batch_size=8)
    make_trainer(max_steps=2).fit(module, datamodule=data)
    for name, tensor in student_of(checkpoint()).items():
        torch.testing.assert_close(module.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_and_an_optimizer_in_8_bits_by_yaml_and_flags_resumed_bit_for_bit(recipe):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    optimizer = {"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.01, "min_8bit_size": 1}}
    path = recipe(model={"adapter": {"alpha": 8}, "optimizer": optimizer})
    main(["fit", "-c", path, "--model.adapter.rank", "2"])
    saved = torch.load(checkpoint(), weights_only=True)
    assert {tensor.shape[0] for name, tensor in student_of(checkpoint()).items() if "lora_A" in name} == {2}
    assert saved["adapter"]["alpha"] == 8
    states = [part for state in saved["optimizer_states"][0]["state"].values() for part in state.values()]
    assert {part["state1"].dtype for part in states if isinstance(part, dict)} == {torch.uint8}
    main(["fit", "-c", path, "--model.adapter.rank", "2", "--trainer.max_steps", "3"])
    main(["fit", "-c", path, "--model.adapter.rank", "2", "--trainer.max_steps", "3", "--ckpt_path", checkpoint()])
    whole, resumed = (student_of(checkpoint(f"runs/opd/version_{version}")) for version in (1, 2))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())

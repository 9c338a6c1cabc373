"""Steps that cannot be taken, in runs that are started as a user starts them."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from faulty import Fault  # noqa: F401  # the command line finds it by its path
from helpers import save, tiny_model
from runs import logged, same, write_recipe
from stable_opd import skips
from stable_opd.cli import main
from stable_opd.resume import checkpoints, step_of
from stable_opd.skips import NonFiniteError

STEPS = 7


@pytest.fixture(scope="module")
def place(teacher_path, train_path, validation_path, tmp_path_factory):
    """A folder with a recipe of which every part remembers something; epochs have 3 steps."""
    place = tmp_path_factory.mktemp("skips")
    anchor = {"weight": 0.1, "controller": {"class_path": "DualAscent"}}
    model = {
        "mixture": {"class_path": "ReplayMixture", "init_args": {"rate": 0.5, "capacity": 20}},
        "constraints": {"anchor": {"class_path": "ReferenceKL", "init_args": anchor}},
        "reference": {"class_path": "MovingAverage", "init_args": {"decay": 0.9}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.7}},
        "update": {"micro_batch_tokens": 200},
    }
    seldom = {"check_val_every_n_epoch": None, "val_check_interval": 100, "num_sanity_val_steps": 0}
    return write_recipe(
        place,
        save(tiny_model(1, attention_dropout=0.3), place / "student"),
        teacher_path,
        train_path,
        validation_path,
        model,
        data={"batch_size": 8},
        trainer={"max_steps": STEPS, **seldom},
        checkpoint={"every_n_steps": 1, "keep": 9},
    )


@pytest.fixture
def run(place, monkeypatch):
    """Go to the folder, and return what runs `fit` with faults in some steps, and returns what it said of skips."""
    monkeypatch.chdir(place)

    def fit(name, what=None, steps=(), *flags):
        fault = {"class_path": "faulty.Fault", "init_args": {"what": what, "steps": list(steps)}}
        planted = ["--trainer.callbacks", json.dumps([fault])] if what else []
        logger = ["--trainer.logger.name", name, "--trainer.logger.version", "0"]
        with warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            warnings.filterwarnings("always", message=r"Step \d+ is skipped")
            main(["fit", "-c", "recipe.yaml", "--ckpt_path", "last", *logger, *planted, *flags])
        return [str(each.message) for each in caught]

    return fit


@pytest.fixture
def whole(run):
    """The same, where there is a run without a fault."""
    if not Path("runs", "whole").exists():
        run("whole")
    return run


def folder(name):
    return Path("runs", name, "version_0")


def state(name, step=STEPS):
    return torch.load(folder(name) / "checkpoints" / f"last-step={step}.ckpt", weights_only=True)


def kept(name, step):
    """A batch that was kept for study: its tensors, and what is said of it."""
    with safe_open(folder(name) / "skipped" / f"step={step}-process=0.safetensors", "pt") as file:
        return {each: file.get_tensor(each) for each in file.keys()}, json.loads(file.metadata()["about"])  # noqa: SIM118


def assert_same_run(name, expected):
    found, wanted = state(name), state(expected)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "reference", "global_step", "epoch"):
        same(found[part], wanted[part], part)
    assert logged(folder(name)) == logged(folder(expected))


@pytest.mark.parametrize("what", ["loss", "gradient", "teacher"])
def test_a_step_that_is_skipped_changes_nothing_that_learns_and_is_counted(what, run):
    name = f"skipped-{what}"
    said = run(name, what, [2, 3, 5])
    assert re.match(r"Step 2 is skipped, because of .*not finite .*The batch is in runs/.*step=2", said[0])
    assert [each[:7] for each in said] == ["Step 2 ", "Step 5 "]
    before, after = state(name, 2), state(name, 4)
    learning = [key for key in before["state_dict"] if key.startswith(("student.", "constraints.", "divergence."))]
    assert any("anchor" in key for key in learning)
    same(before["optimizer_states"][0]["state"], after["optimizer_states"][0]["state"])
    same(before["reference"], after["reference"])
    same(*({key: each["state_dict"][key] for key in learning} for each in (before, after)))
    assert not torch.equal(state(name, 5)["state_dict"][learning[0]], after["state_dict"][learning[0]])
    rates = [state(name, step)["optimizer_states"][0]["param_groups"][0]["lr"] for step in (4, 7)]
    assert rates == pytest.approx([1e-3 * 0.7**4, 1e-3 * 0.7**7])  # that of the step, as in a run without a fault
    found = logged(folder(name))
    assert [int(row["step"]) for row in found] == list(range(STEPS))
    assert [float(row["train/skipped"]) for row in found] == [0, 0, 1, 2, 2, 3, 3]
    finite = [math.isfinite(float(row["train/loss"])) and math.isfinite(float(row["train/grad_norm"])) for row in found]
    assert finite == [each not in (2, 3, 5) for each in range(STEPS)]
    # One batch of each series is kept; each step had its own.
    assert {path.name for path in (folder(name) / "skipped").iterdir()} == {
        f"step={step}-process=0.safetensors" for step in (2, 5)
    }


def test_the_batch_that_is_kept_says_what_was_wrong(run):
    """Who gave no log-probs, which terms have no gradient, and the rollout itself."""
    assert re.search(
        r"\(divergence, mixture\); the teacher gave (\d+) of \1 tokens no", run("kept", "teacher", [2, 4])[0]
    )
    tensors, about = kept("kept", 2)
    assert about["step"] == 2
    assert math.isnan(about["figures"]["loss/divergence"])
    assert math.isfinite(about["figures"]["loss/anchor"])
    assert math.isnan(about["gradient_norms"]["divergence"])
    assert math.isfinite(about["gradient_norms"]["anchor"])
    assert about["without_logprob"]["student"] == about["without_logprob"]["reference"] == 0
    students = tensors["token_author"] == 0
    assert about["without_logprob"]["teacher"] == len(students) > int(students.sum()) > 0
    assert tensors["logprobs/teacher"].isnan().all()
    assert tensors["logprobs/student"].isfinite().all()
    # They were drawn from the student; the float error of decoding is larger than that of reading.
    drawn = tensors["behaviour_logprobs"][students]
    torch.testing.assert_close(tensors["logprobs/student"][students], drawn, rtol=1e-4, atol=1e-4)
    assert tensors["lengths"].sum() == len(tensors["token_author"])
    assert tensors["prompt_lengths"].sum() + tensors["lengths"].sum() == len(tensors["tokens"])
    assert float(tensors["share/divergence"].sum()) == pytest.approx(1.0)
    assert len(about["texts"]) == len(tensors["lengths"])
    assert tensors["index"].tolist() != kept("kept", 4)[0]["index"].tolist()


def test_a_run_that_skips_goes_on_from_every_step_as_if_it_had_not_been_killed(run):
    """The faults are planted in the resumed run, too; the count of steps in a row is part of the state."""
    run("killed-whole", "gradient", [2, 3, 5])
    for step in (2, 3, 4):
        name = f"killed-{step}"
        shutil.copytree(Path("runs", "killed-whole"), Path("runs", name))
        for path in checkpoints(folder(name) / "checkpoints"):
            if step_of(path) > step:
                path.unlink()
        run(name, "gradient", [2, 3, 5])
        assert_same_run(name, "killed-whole")


def test_too_many_in_a_row_stop_the_run_which_goes_on_where_it_was(run):
    """The step that was one too many is not taken, so without the fault it is as if that had not been."""
    run("two", "gradient", [2, 3])
    refused = r"in step 4, but got a gradient .*\(divergence, anchor, mixture\).* after 2 steps in a row"
    with pytest.raises(NonFiniteError, match=refused) as error:
        run("stopped", "gradient", [2, 3, 4], "--model.update.max_skipped", "2")
    assert "The first such batch is in" in str(error.value)
    assert "The state after 4 steps, before the one that failed, is kept" in error.value.__notes__[0]
    assert step_of(checkpoints(folder("stopped") / "checkpoints")[0]) == 4
    with pytest.raises(NonFiniteError, match="in step 4"):  # and again, as long as nothing is different
        run("stopped", "gradient", [4], "--model.update.max_skipped", "2")
    run("stopped")
    assert_same_run("stopped", "two")


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("loss", NonFiniteError, r"a loss that is not finite \(divergence\)\. The batch is in"),
        ("teacher", NonFiniteError, r"the teacher gave \d+ of \d+ tokens no log-prob.*Look at the teacher's weights"),
        ("rollout", RuntimeError, "no rollout any more"),
    ],
)
def test_a_step_that_fails_is_as_if_it_had_not_begun(what, error, says, whole):
    """The state before it is saved, whatever the step has done so far, also if no checkpoint was due."""
    name = f"failed-{what}"
    with pytest.raises(error, match=says):
        whole(name, what, [3], "--model.update.max_skipped", "0", "--checkpoint.every_n_steps", "50")
    assert [step_of(each) for each in checkpoints(folder(name) / "checkpoints")] == [3]
    whole(name)
    assert_same_run(name, "whole")


@pytest.mark.parametrize(("what", "step", "every"), [("student", 3, "2"), ("weights", 2, "1")])
def test_weights_that_are_not_finite_are_never_saved(what, step, every, whole):
    """A run that went on from them would fail for good: neither when it is time nor when a step fails."""
    name = f"harmed-{what}"
    with pytest.raises((ValueError, ArithmeticError)) as error:
        whole(name, what, [step], "--checkpoint.every_n_steps", every)
    said = "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])
    assert "Expected finite weights after step 3, but got some that are not, and did not save them" in said
    assert "The checkpoint of step 2 is whole" in said
    assert step_of(checkpoints(folder(name) / "checkpoints")[0]) == 2
    whole(name)
    assert_same_run(name, "whole")


@pytest.mark.parametrize("what", ["optimizer", "report"])
def test_an_error_once_the_optimizer_has_begun_saves_nothing(what, whole):
    """What would be saved is neither the state before the step nor that after it."""
    with pytest.raises(RuntimeError, match=what):
        whole(f"late-{what}", what, [1], "--checkpoint.every_n_steps", "50")
    assert checkpoints(folder(f"late-{what}") / "checkpoints") == []


def test_files_of_batches_do_not_fill_a_disk(run, monkeypatch):
    monkeypatch.setattr(skips, "KEPT", 1)
    said = run("many", "gradient", [2, 4])
    assert re.match(r"Step 4 is skipped.*The batch is not kept: there are 1 in .* already", said[1])
    assert [path.name for path in (folder("many") / "skipped").iterdir()] == ["step=2-process=0.safetensors"]


def test_a_batch_that_cannot_be_written_does_not_stop_the_run(run):
    folder("blocked").mkdir(parents=True)
    (folder("blocked") / "skipped").write_text("a file")
    (said,) = run("blocked", "gradient", [2])
    assert re.match(r"Step 2 is skipped.*The batch could not be kept: .*File exists", said)
    assert len(logged(folder("blocked"))) == STEPS


def test_mixed_precision_and_a_guard_cope_with_steps_that_are_skipped(run):
    """The guard sees figures that are not finite, in its quiet phase and later."""
    guard = {"class_path": "CollapseGuard", "init_args": {"mode": "act", "every": 3, "patience": 1}}
    fault = {"class_path": "faulty.Fault", "init_args": {"what": "teacher", "steps": [3, 4, 12, 13]}}
    flags = ["--trainer.precision", "bf16-mixed", "--trainer.max_steps", "20", "--checkpoint.every_n_steps", "50"]
    flags += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1e-6", "--data.batch_size", "24"]
    flags += ["--model.reference", "InitialStudent"]
    said = run("guarded", None, (), *flags, "--trainer.callbacks", json.dumps([fault, guard]))
    assert len(said) == 2
    assert [float(row["train/skipped"]) for row in logged(folder("guarded"))][-1] == 4
    assert not (folder("guarded") / "events.jsonl").exists()


@pytest.mark.parametrize("name", ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "NAdam", "RMSprop", "SGD"])
def test_optimizers_of_torch_do_nothing_without_gradients(name):
    """What skipping relies on: a step without gradients changes neither weights nor state."""

    def remembered():
        state = optimizer.state[weights].items()
        return weights.detach().clone(), {key: torch.as_tensor(each).clone() for key, each in state if each is not None}

    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = getattr(torch.optim, name)([weights], lr=0.1, weight_decay=0.1)
    weights.grad = torch.ones(3)
    optimizer.step()
    kept = remembered()
    optimizer.zero_grad()
    optimizer.step()
    same(kept, remembered())

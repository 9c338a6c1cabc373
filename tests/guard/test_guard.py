import json

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from guard.scripted import Scripted
from helpers import Recorder, make_trainer, weights
from stable_opd import (
    ExactMatch,
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    StudentOnly,
)
from stable_opd.constraints import EntropyFloor, InitialWeights
from stable_opd.data import Source
from stable_opd.guard import CollapseGuard
from stable_opd.guard.slowing import Slowing
from stable_opd.options import RolloutOptions
from stable_opd.policies import Policies
from stable_opd.references import MovingAverage
from stable_opd.schedules import OnMetric

#: It warns of what it does, which is what it is there for.
pytestmark = pytest.mark.filterwarnings("ignore:CollapseGuard at step", "ignore:.*not empty")


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


@pytest.fixture
def build(student_path, teacher_path):
    """Make a module: Stable-OPD with tiny models."""

    def build(**options):
        parts = {
            "mixture": GoldenMixture(2.0),
            "constraints": {"anchor": ReferenceKL(0.5)},
            "optimizer": adam,
            "rollout": RolloutOptions(samples_per_prompt=1, max_new_tokens=6),
        }
        teacher, repetition = LocalTeacher(teacher_path), PeriodicSuffix(max_period=4, min_tokens=3)
        return OPDModule(student_path, teacher, ReverseKL(), repetition=repetition, **parts | options)

    return build


@pytest.fixture
def fit(train_path, tmp_path):
    """Train a module in a folder, and return the trainer."""

    def fit(module, *callbacks, steps, folder="run", ckpt_path=None):
        data = PromptDataModule(Source(train_path), None, ExactMatch(), batch_size=4)
        logger = CSVLogger(tmp_path / folder, name="", version="")
        trainer = make_trainer(*callbacks, max_steps=steps, logger=logger, log_every_n_steps=1)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return fit


@pytest.fixture
def events(tmp_path):
    def events(folder="run", *actions):
        lines = (tmp_path / folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        return [each for each in map(json.loads, lines) if not actions or each["action"] in actions]

    return events


class Kept(Callback):
    """Keeps weights, moments of the optimizer and learning rates after some steps; it has to stand behind the guard."""

    def __init__(self):
        self.weights, self.moments, self.rates = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        (optimizer,), step = trainer.optimizers, trainer.global_step
        self.weights[step] = weights(pl_module)
        self.moments[step] = [state["exp_avg"].clone() for state in optimizer.state.values()]
        self.rates[step] = optimizer.param_groups[0]["lr"]


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_terms_that_rest_change_nothing(build, fit):
    """No golden row, no pass of the reference: not a bit is different from plain distillation."""
    resting, plain, recorder = build(), build(mixture=StudentOnly(), constraints=None), Recorder()
    fit(resting, CollapseGuard("act", resting=True), recorder, steps=3)
    fit(plain, steps=3, folder="plain")
    assert same(weights(resting), weights(plain))
    assert not any("mixture" in name or "anchor" in name for step in recorder.steps for name in step)


def test_a_term_counts_as_much_as_its_strength_says(build, fit):
    """Twice the strength is the same as twice the weight; the value stays what it is."""
    stronger, heavier, one, other = build(), build(mixture=GoldenMixture(4.0)), Recorder(), Recorder()
    stronger.mixture.strength = 2.0
    fit(stronger, one, steps=2)
    fit(heavier, other, steps=2)
    for name, tensor in weights(stronger).items():
        torch.testing.assert_close(tensor, weights(heavier)[name])
    for step, expected in zip(one.steps, other.steps, strict=True):
        for name in ("train/loss/mixture", "train/value/mixture", "train/loss"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4)


def test_the_strength_counts_for_a_penalty_on_weights_too(build, fit):
    stronger, heavier = (build(constraints={"anchor": InitialWeights(weight)}) for weight in (1.0, 3.0))
    stronger.constraints["anchor"].strength = 3.0
    fit(stronger, steps=3)
    fit(heavier, steps=3)
    for name, tensor in weights(stronger).items():
        torch.testing.assert_close(tensor, weights(heavier)[name])


def test_an_alarm_wakes_the_terms_and_calm_lets_them_rest_again(build, fit, events):
    module, recorder = build(), Recorder()
    guard = CollapseGuard("act", resting=True, calm=4)
    fit(module, Scripted([[15, 20]]), guard, recorder, steps=40)
    told = events("run", "raise", "lower")
    assert [each["action"] for each in told] == ["raise", "lower"]
    raised, lowered = (each["step"] for each in told)
    # Inflated from 15 to 19: of the last five, two make the hazard lower by a fifth, and that is so from 16 to 22.
    assert (raised, lowered) == (16, 22 + 4)
    assert "the length rose from 20 to 36 since step 15" in told[0]["reason"]
    assert "mixture, anchor count 1 times their weight" in told[0]["done"]
    taught = [step for step, figures in enumerate(recorder.steps) if "train/loss/mixture" in figures]
    assert taught[0] == raised + 1
    assert module.mixture.strength == module.constraints["anchor"].strength == 1.0  # as they were found


def test_going_back_restores_what_the_checkpoint_holds_and_nothing_else(build, fit, events, tmp_path):
    kept, rate = Kept(), lambda step: 1 / (1 + step)
    module = build(lr_scheduler=lambda optimizer: LambdaLR(optimizer, rate))
    guard = CollapseGuard("act", raises=0, rollbacks=1, every=5, patience=50)
    trainer = fit(module, Scripted([[15, 20]]), guard, kept, steps=18)
    (told,) = events("run", "roll back")
    # There are checkpoints after 10 and 15 steps, but the weights after 15 wrote what was inflated first.
    assert told["step"] == 16
    assert "went back to the weights of step 10" in told["done"]
    assert same(kept.weights[17], kept.weights[10])
    assert not same(kept.weights[16], kept.weights[10])
    assert all(torch.equal(one, other) for one, other in zip(kept.moments[17], kept.moments[10], strict=True))
    assert [kept.rates[step] for step in (10, 17, 18)] == pytest.approx([1e-2 * rate(step) for step in (10, 17, 18)])
    assert trainer.global_step == 18
    assert [path.name for path in (tmp_path / "run/healthy").iterdir()] == ["step=10.ckpt"]
    assert "mixture, anchor count 2 times their weight; the learning rate 0.5 times" in told["done"]


def test_going_back_takes_the_moving_reference_along(build, fit):
    states = {}

    class Reference(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            state = pl_module.readers.reference.state_dict()
            states[trainer.global_step] = {name: tensor.clone() for name, tensor in state.items()}

    guard = CollapseGuard("act", raises=0, rollbacks=1, every=2, patience=50)
    fit(build(reference=MovingAverage(0.5)), Scripted([[15, 20]]), guard, Reference(), steps=17)
    assert same(states[17], states[14])
    assert not same(states[16], states[14])


def test_an_alarm_that_lasts_ends_the_run_with_healthy_weights(build, fit, events, tmp_path):
    module, kept = build(), Kept()
    guard = CollapseGuard("act", rollbacks=1, patience=6, every=3)
    trainer = fit(module, Scripted([[15, 100]]), guard, kept, steps=60)
    told = events("run", "raise", "roll back", "stop")
    assert [(each["step"], each["action"]) for each in told] == [(16, "raise"), (23, "roll back"), (30, "stop")]
    assert trainer.global_step == 31
    assert same(weights(module), kept.weights[13])
    healthy = torch.load(tmp_path / "run/healthy/step=13.ckpt", weights_only=True)["state_dict"]
    assert same(weights(module), {name.removeprefix("student."): tensor for name, tensor in healthy.items()})


def test_a_run_that_was_stopped_stays_so(build, fit, tmp_path):
    stopped = fit(build(), Scripted([[15, 100]]), CollapseGuard("act", raises=0, rollbacks=0, every=3), steps=60)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    guard = CollapseGuard("act", raises=0, rollbacks=0, every=3)
    again = fit(build(), Scripted([]), guard, steps=60, ckpt_path=tmp_path / "stopped.ckpt")
    assert again.global_step == stopped.global_step < 60


def test_a_schedule_may_follow_a_term_that_rests(build, fit):
    schedule = OnMetric("train/value/mixture", above=0.0, patience=1)
    module = build(constraints={"anchor": ReferenceKL(0.5, schedule=schedule)})
    fit(module, Scripted([]), CollapseGuard("act", resting=True, every=3), steps=2)
    assert schedule.factor == 1.0  # there was nothing to follow


def test_the_last_three_healthy_checkpoints_are_kept(build, fit, tmp_path):
    fit(build(), Scripted([]), CollapseGuard("act", every=2), steps=19)
    found = sorted(path.name for path in (tmp_path / "run/healthy").iterdir())
    assert found == ["step=14.ckpt", "step=16.ckpt", "step=18.ckpt"]


def test_without_its_files_it_goes_on(build, fit, events, tmp_path):
    class Gone(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 15:
                for path in (tmp_path / "run/healthy").iterdir():
                    path.unlink()

    fit(build(), Gone(), Scripted([[15, 20]]), CollapseGuard("act", raises=0, every=4), steps=18)
    (told,) = events("run", "roll back")
    assert "there is no healthy checkpoint to go back to" in told["done"]


def test_a_run_that_is_resumed_is_the_one_that_was_not_interrupted(build, fit, events, tmp_path):
    """Cut before the first alarm, between the answers, and after the way back."""

    def callbacks():
        return Scripted([[15, 25]]), CollapseGuard("act", resting=True, patience=6, every=3, calm=2)

    def placeless(folder):
        return [json.dumps(each).replace(str(tmp_path / folder), "") for each in events(folder)]

    whole = build()
    fit(whole, *callbacks(), steps=33, folder="whole")
    assert [each["action"] for each in events("whole") if each["action"] != "notice"] == ["raise", "roll back", "lower"]
    for cut in (12, 20, 27):
        half, resumed, folder = build(), build(), f"cut-{cut}"
        fit(half, *callbacks(), steps=cut, folder=folder).save_checkpoint(tmp_path / f"{folder}.ckpt")
        fit(resumed, *callbacks(), steps=33, folder=folder, ckpt_path=tmp_path / f"{folder}.ckpt")
        assert same(weights(resumed), weights(whole))
        assert placeless(folder) == placeless("whole")


def test_a_warning_is_given_once_for_each_alarm_and_changes_nothing(build, fit, events, tmp_path):
    warned, unguarded = build(), build()
    with pytest.warns(UserWarning, match="CollapseGuard at step 16, warn: the stop hazard fell from 0.05 to") as told:
        fit(warned, Scripted([[15, 20], [30, 33]]), CollapseGuard("warn"), steps=40)
    assert sum("CollapseGuard" in str(each.message) for each in told) == 2
    fit(unguarded, Scripted([[15, 20], [30, 33]]), CollapseGuard("off"), steps=40, folder="off")
    assert same(weights(warned), weights(unguarded))
    assert [each["step"] for each in events("run", "warn")] == [16, 31]
    assert not (tmp_path / "run/healthy").exists()
    assert not (tmp_path / "off/events.jsonl").exists()


def test_signals_that_move_in_healthy_runs_are_noted_and_no_more(build, fit, events):
    class Steep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.report.figures["train/grad_norm"] = torch.tensor(1.0 if trainer.global_step < 15 else 9.0)

    fit(build(), Scripted([]), Steep(), CollapseGuard("act", votes=1), steps=25)
    told = [each for each in events() if "the gradient norm" in each["reason"]]
    assert [each["action"] for each in told] == ["notice"]
    assert not events("run", "raise")


@pytest.mark.parametrize(
    "schedule",
    [lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step), lambda optimizer: LinearLR(optimizer, 0.1, 1.0, 9)],
    ids=["sets the rate anew", "reckons with the last rate"],
)
def test_a_lower_rate_makes_shorter_steps_and_no_schedule_sees_it(schedule):
    def descend(factor):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        scheduler, slowing, found = schedule(optimizer), Slowing(), []
        slowing.attach([optimizer])
        for step in range(6):
            slowing.factor = factor if step >= 3 else 1.0
            weight.grad = torch.ones_like(weight)
            before = weight.item()
            optimizer.step()
            scheduler.step()
            found.append((weight.item() - before, optimizer.param_groups[0]["lr"]))
        slowing.detach()
        return found

    for step, ((moved, rate), (expected, plain)) in enumerate(zip(descend(0.25), descend(1.0), strict=True)):
        assert moved == pytest.approx(expected * (0.25 if step >= 3 else 1.0), rel=1e-12)
        assert rate == plain


@pytest.mark.parametrize(
    ("options", "parts", "match"),
    [
        ({"mode": "loud"}, {}, "Expected a mode out of off, warn, act, but got 'loud'"),
        ({"factor": 1.0}, {}, "Expected a factor above 1"),
        ({"votes": 7}, {}, "votes between 1 and 6"),
        ({"terms": ["achor"]}, {}, "but got achor. .* Known terms: mixture, anchor"),
        ({}, {"mixture": StudentOnly(), "constraints": None}, "terms to raise, but got none. Add a mixture such as"),
        ({}, {"mixture": StudentOnly(), "constraints": {"bonus": EntropyFloor()}}, "but got none"),
        ({"resting": True}, {"policies": Policies(loops="golden")}, "resting: false"),
    ],
)
def test_what_cannot_work_is_refused(options, parts, match, build, fit):
    with pytest.raises(ValueError, match=match):
        fit(build(**parts), CollapseGuard(**{"mode": "act"} | options), steps=1)


def test_the_terms_that_hold_the_student_are_found(build):
    guard = CollapseGuard("act")
    module = build(constraints={"anchor": ReferenceKL(), "weights": InitialWeights(), "bonus": EntropyFloor()})
    guard.setup(None, module, "fit")
    assert list(guard.terms) == ["mixture", "anchor", "weights"]
    named = CollapseGuard("act", terms=["bonus"])
    named.setup(None, module, "fit")
    assert list(named.terms) == ["bonus"]

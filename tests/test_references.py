"""References: what they are after each step, by themselves and in a training."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from helpers import Recorder, make_trainer, tiny_model, weights
from stable_opd import LocalTeacher, OPDModule, PeriodicSuffix, PromptDataModule, ReferenceKL, ReverseKL, StudentOnly
from stable_opd.constraints import InitialWeights
from stable_opd.controllers import DualAscent
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.references import InitialStudent, MovingAverage, PeriodicReset, Reference
from stable_opd.schedules import OnMetric
from stable_opd.sources import Source

STEPS = 5


def follow(reference, steps, model=None):
    """The student (k, 2) and the reference (k, 2) after each step of a student that moves by chance; from 1 and -1."""
    torch.manual_seed(0)
    student, anchor = nn.Linear(1, 1).double(), nn.Linear(1, 1).double().requires_grad_(False)
    for each in (student, anchor):
        nn.init.constant_(each.weight, 1.0)
        nn.init.constant_(each.bias, -1.0)
    states, anchors = [], []
    for step in range(1, steps + 1):
        for parameter in student.parameters():
            parameter.data += torch.randn_like(parameter)
        reference.update(anchor, student, step)
        for kept, each in ((states, student), (anchors, anchor)):
            kept.append(torch.stack([each.weight.detach().flatten(), each.bias.detach()]).flatten())
    return torch.stack(states), torch.stack(anchors)


START = torch.tensor([1.0, -1.0], dtype=torch.float64)


def averages(start, states, decay):
    """decay^k theta_0 + (1 - decay) sum_i decay^(k - i) theta_i, written out."""
    return [
        decay**k * start + (1 - decay) * sum(decay ** (k - i) * states[i - 1] for i in range(1, k + 1))
        for k in range(1, len(states) + 1)
    ]


def test_initial_student_stays():
    _, anchors = follow(InitialStudent(), 3)
    assert (anchors == START).all()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moving_average_is_the_closed_form(decay):
    states, anchors = follow(MovingAverage(decay), 7)
    torch.testing.assert_close(anchors, torch.stack(averages(START, states, decay)))


def test_moving_average_comes_to_a_student_that_stays():
    student, anchor = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    gap = (anchor.weight - student.weight).detach()
    for step in range(1, 21):
        MovingAverage(0.8).update(anchor, student, step)
    torch.testing.assert_close(anchor.weight - student.weight, 0.8**20 * gap, rtol=1e-3, atol=1e-6)


def test_periodic_reset_copies_when_it_is_time():
    states, anchors = follow(PeriodicReset(3), 8)
    expected = [START, START, states[2], states[2], states[2], states[5], states[5], states[5]]
    assert (anchors == torch.stack(expected)).all()


def test_reset_in_every_step_is_an_average_without_memory():
    for reference in (PeriodicReset(1), MovingAverage(0.0)):
        states, anchors = follow(reference, 4)
        torch.testing.assert_close(anchors, states, rtol=0, atol=0)


@pytest.mark.parametrize("reference", [MovingAverage(0.5), PeriodicReset(1)], ids=["average", "reset"])
def test_update_leaves_no_graph_and_no_link_to_the_student(reference):
    student, anchor = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    reference.update(anchor, student, 1)
    kept = anchor.weight.clone()
    student.weight.data.zero_()
    torch.testing.assert_close(anchor.weight, kept, rtol=0, atol=0)
    assert not anchor.weight.requires_grad
    assert anchor.weight.grad_fn is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_in_a_precision_that_would_lose_it_is_refused(dtype):
    student, anchor = nn.Linear(2, 2), nn.Linear(2, 2).to(dtype)
    with pytest.raises(ValueError, match=r"round its moves away.*PeriodicReset"):
        MovingAverage().check(dtype)
    PeriodicReset(1).check(dtype)
    PeriodicReset(1).update(anchor, student, 1)
    torch.testing.assert_close(anchor.weight, student.weight.to(dtype))


def test_models_that_differ_are_refused():
    for reference in (MovingAverage(), PeriodicReset(1)):
        with pytest.raises(ValueError, match="zip"):
            reference.update(nn.Linear(2, 2, bias=False), nn.Linear(2, 2), 1)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="Use InitialStudent"):
        MovingAverage(decay)


def test_reset_without_steps_in_between_is_refused():
    with pytest.raises(ValueError, match="every of at least 1, but got 0"):
        PeriodicReset(0)


def test_only_those_that_change_say_so():
    """Checkpoints hold the others for nothing, or lose one that has moved."""
    assert {cls.__name__: cls.moves for cls in Reference.__subclasses__() if "<locals>" not in cls.__qualname__} == {
        "InitialStudent": False,
        "MovingAverage": True,
        "PeriodicReset": True,
    }


class Snapshots(Recorder):
    """Keeps the weights of student and reference after each step."""

    def __init__(self):
        super().__init__()
        self.students, self.anchors = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        super().on_train_batch_end(trainer)
        self.students.append(flat(pl_module.model))
        self.anchors.append(flat(pl_module.readers.reference))


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture
def run(student_path, teacher_path, train_path):
    """Train a student against a reference, from a checkpoint if one is given; return the module and its snapshots."""

    def run(reference, *callbacks, checkpoint=None, constraints=None, **update):
        module = OPDModule(
            student=student_path,
            teacher=LocalTeacher(teacher_path),
            divergence=ReverseKL(),
            mixture=StudentOnly(),
            repetition=PeriodicSuffix(4, 3, 3),
            constraints=constraints or {"anchor": ReferenceKL(0.5)},
            reference=reference,
            optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5),
            rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=10),
            update=UpdateOptions(**update),
        )
        snapshots = Snapshots()
        trainer = make_trainer(snapshots, *callbacks, max_steps=STEPS, enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=PromptDataModule(Source(train_path), batch_size=4), ckpt_path=checkpoint)
        return module, snapshots

    return run


@pytest.mark.parametrize("offload", [(), ("reference",)], ids=["beside", "offloaded"])
def test_average_in_a_training_is_the_closed_form(run, offload):
    module, snapshots = run(MovingAverage(0.7), offload=offload)
    expected = averages(flat(tiny_model(1)), snapshots.students, 0.7)
    assert len(expected) == STEPS
    for found, each in zip(snapshots.anchors, expected, strict=True):
        torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-6)
    assert (snapshots.anchors[-1] - snapshots.anchors[0]).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in module.readers.reference.parameters())


def test_reset_in_a_training_copies_after_the_steps_that_were_named(run):
    _, snapshots = run(PeriodicReset(2))
    start, states = flat(tiny_model(1)), snapshots.students
    for found, each in zip(snapshots.anchors, [start, states[1], states[1], states[3], states[3]], strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=0)


def test_divergence_from_a_reference_that_was_just_reset_is_zero(run):
    _, snapshots = run(PeriodicReset(2))
    values = [step["train/value/anchor"] for step in snapshots.steps]
    assert [value > 1e-5 for value in values] == [False, True, False, True, False]


CONSTRAINTS = {
    "plain": lambda: {"anchor": ReferenceKL(0.5)},
    "controlled": lambda: {"anchor": ReferenceKL(0.5, controller=DualAscent(1e-3, rate=0.01))},
    "on a metric": lambda: {"anchor": ReferenceKL(0.5, OnMetric("train/truncation_rate", 0.0, 1))},
    "weights": lambda: {"anchor": InitialWeights(0.5)},
}


@pytest.mark.parametrize("constraints", CONSTRAINTS.values(), ids=CONSTRAINTS.keys())
@pytest.mark.parametrize("make", [InitialStudent, partial(MovingAverage, 0.7), partial(PeriodicReset, 2)])
def test_resumed_run_equals_an_uninterrupted_one(make, constraints, run, tmp_path):
    keep = lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)  # noqa: E731
    whole, _ = run(make(), keep(tmp_path), constraints=constraints())
    for step in (1, 3):
        path = tmp_path / f"step={step}.ckpt"
        assert ("reference" in torch.load(path, weights_only=True)) == make().moves
        resumed, snapshots = run(make(), keep(tmp_path / f"resumed-{step}"), checkpoint=path, constraints=constraints())
        assert len(snapshots.steps) == STEPS - step
        for name, tensor in weights(whole).items():
            torch.testing.assert_close(weights(resumed)[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(flat(resumed.readers.reference), flat(whole.readers.reference), rtol=0, atol=0)
        for name, tensor in whole.constraints.state_dict().items():
            torch.testing.assert_close(resumed.constraints.state_dict()[name], tensor, rtol=0, atol=0)


def test_state_of_controller_and_schedule_has_moved(run):
    """Otherwise the test above would compare what never changes."""
    for name in ("controlled", "on a metric"):
        module, _ = run(InitialStudent(), constraints=CONSTRAINTS[name]())
        (state,) = module.constraints.state_dict().values()
        assert state.flatten()[0] != 1


def test_weights_are_pulled_in_a_training(run):
    """With a weight that dwarfs the other terms, the value is logged and the student stays near where it was."""
    factors = {"free": 0.0, "held": 5.0}
    clipped = {
        name: run(InitialStudent(), constraints={"w": InitialWeights(weight)}, gradient_clip=1e9)
        for name, weight in factors.items()
    }
    start = flat(tiny_model(1))
    distance = {name: (flat(module.model) - start).norm().item() for name, (module, _) in clipped.items()}
    assert distance["held"] < 0.7 * distance["free"]
    for name, (_, snapshots) in clipped.items():
        values = [step["train/value/w"] for step in snapshots.steps]
        gaps = [0.0, *((state - start).square().sum().item() / 2 for state in snapshots.students[:-1])]
        assert values == pytest.approx(gaps, rel=1e-4)
        weight = factors[name]
        assert [step["train/loss/w"] for step in snapshots.steps] == pytest.approx([weight * gap for gap in gaps])

"""What rests in the host's memory while it is not in use: nothing but the places may differ."""

from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch import Tensor, nn

from helpers import Recorder, make_trainer, tiny_model, weights
from stable_opd import (
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    learning,
)
from stable_opd.cli import main
from stable_opd.offload import move_state, visiting
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.resume import newest
from stable_opd.sources import Source

ELSEWHERE, HOST = torch.device("cpu:0"), torch.device("cpu")  # the same memory under two names
STEPS = 3


@pytest.fixture
def moves(monkeypatch):
    """Of each move of a module: which one, and where to."""
    found, move = [], nn.Module.to

    def to(module, *args, **kwargs):
        found.append((module, torch.device(args[0])))
        return move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    return found


def test_visitor_is_there_for_the_time_of_the_context(moves):
    model = tiny_model(1)
    with visiting(model, ELSEWHERE):
        assert moves == [(model, ELSEWHERE)]
    assert moves == [(model, ELSEWHERE), (model, HOST)]


def test_visitor_leaves_when_something_goes_wrong(moves):
    model = tiny_model(1)
    with pytest.raises(ZeroDivisionError), visiting(model, ELSEWHERE):
        _ = 1 / 0
    assert moves == [(model, ELSEWHERE), (model, HOST)]


class Travelling(Tensor):
    """A tensor that remembers where it was sent."""

    def to(self, device):
        moved = self.clone()
        moved.place = device
        return moved


def stepped(optimizer, **options):
    """An optimizer after one step of a small model."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = optimizer(model.parameters(), **options)
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_moments_move_and_the_count_of_the_steps_stays():
    optimizer, untouched = stepped(torch.optim.AdamW), stepped(torch.optim.AdamW)
    for state in optimizer.state.values():
        state.update({name: value.as_subclass(Travelling) for name, value in state.items()})
    move_state(optimizer, ELSEWHERE)
    assert len(optimizer.state) == 2
    for state, before in zip(optimizer.state.values(), untouched.state.values(), strict=True):
        assert {name: getattr(value, "place", None) for name, value in state.items()} == {
            "step": None,
            "exp_avg": ELSEWHERE,
            "exp_avg_sq": ELSEWHERE,
        }
        for name, value in before.items():
            torch.testing.assert_close(state[name].as_subclass(Tensor), value, rtol=0, atol=0)


def test_what_is_no_tensor_stays():
    """Without momentum there is no buffer."""
    optimizer = stepped(torch.optim.SGD, lr=0.1)
    optimizer.state[optimizer.param_groups[0]["params"][0]] |= {"momentum_buffer": None, "name": "first"}
    move_state(optimizer, ELSEWHERE)
    assert {"momentum_buffer": None, "name": "first"} in optimizer.state.values()


class Hooks(Callback):
    """Says when the student and the reference read."""

    def __init__(self, events):
        self.events = events

    def on_train_start(self, trainer, pl_module):
        for name, model in (("student", pl_module.model), ("reference", pl_module.readers.reference)):
            model.base_model.register_forward_pre_hook(lambda *_, name=name: self.events.append(f"{name} reads"))


@pytest.fixture
def run(student_path, teacher_path, train_path, monkeypatch):
    """Train for three steps of several micro-batches; returns the figures, the weights, the module and the events."""

    def run(teacher_rests=False, offload=()):
        events = []
        monkeypatch.setattr(learning, "move_state", lambda *args: (events.append("moments move"), move_state(*args)))

        class Watching(LocalTeacher):
            """Says when it reads."""

            def score(self, rollout):
                events.append("teacher reads")
                return super().score(rollout)

        class Adam(torch.optim.AdamW):
            """Says when it steps."""

            def step(self, closure=None):
                events.append("optimizer steps")
                return super().step(closure)

        module = OPDModule(
            student_path,
            Watching(teacher_path, teacher_rests),
            ReverseKL(),
            GoldenMixture(),
            PeriodicSuffix(4, 3, 3),
            {"anchor": ReferenceKL(0.1)},
            optimizer=partial(Adam, lr=1e-2),
            rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=10),
            update=UpdateOptions(micro_batch_tokens=60, offload=offload),
        )
        recorder = Recorder()
        trainer = make_trainer(recorder, Hooks(events), max_steps=STEPS)
        trainer.fit(module, datamodule=PromptDataModule(Source(train_path), batch_size=4))
        figures = [{name: repr(step[name]) for name in step if name.startswith("train/")} for step in recorder.steps]
        return figures, weights(module), module, events

    return run


OFFLOADS = {
    "teacher": (True, ()),
    "reference": (False, ("reference",)),
    "optimizer": (False, ("optimizer",)),
    "everything": (True, ("optimizer", "reference")),
}


@pytest.mark.parametrize(("teacher_rests", "offload"), OFFLOADS.values(), ids=OFFLOADS)
def test_training_is_the_same_bit_for_bit(teacher_rests, offload, run):
    expected_figures, expected, *_ = run()
    figures, found, *_ = run(teacher_rests, offload)
    assert len(figures) == STEPS
    assert figures == expected_figures
    start = dict(tiny_model(1).named_parameters())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
        assert (tensor != start[name]).any()


def by_step(events):
    """What happened in each step, up to the optimizer's."""
    steps = [[]]
    for event in events:
        if event == "optimizer steps":
            steps.append([])
        elif event != "moments move":
            steps[-1].append(event)
    return steps[:-1]


@pytest.mark.parametrize(("teacher_rests", "offload"), [(True, ()), (False, ("reference",))])
def test_whoever_rests_reads_everything_before_the_student_does(teacher_rests, offload, run):
    *_, events = run(teacher_rests, offload)
    for step in by_step(events):
        first = step.index("student reads")
        assert step.count("student reads") > 1
        assert set(step[first:]) == {"student reads"}
        assert set(step[:first]) == {"teacher reads", "reference reads"}


def test_whoever_stays_reads_along_with_the_student(run):
    *_, events = run()
    for step in by_step(events):
        students = [place for place, event in enumerate(step) if event == "student reads"]
        assert "teacher reads" in step[students[0] :]
        assert "reference reads" in step[students[0] :]


def test_visits_are_one_for_each_step(run, moves):
    """Once the trainer has placed everything: there and back again, and nobody else moves."""
    *_, module, _ = run(True, ("reference",))
    visitors = [module.readers.reference, module.readers.teacher.model]
    moved = [who for who, _ in moves[-4 * STEPS :]]
    for step in range(STEPS):
        there, back = moved[4 * step :][:2], moved[4 * step + 2 :][:2]
        assert {id(each) for each in there} == {id(each) for each in back} == {id(each) for each in visitors}


def test_nothing_visits_unless_it_is_asked_to(run, moves):
    *_, module, _ = run()
    for each in (module.readers.reference, module.readers.teacher.model):
        assert sum(who is each for who, _ in moves) <= 2  # where the trainer begins


def test_moments_are_there_for_the_step_and_leave_after_it(run):
    *_, events = run(offload=("optimizer",))
    around = [event for event in events if event in ("moments move", "optimizer steps")]
    assert around == ["moments move", "optimizer steps", "moments move"] * STEPS
    assert "moments move" not in run()[-1]


@pytest.fixture
def recipe(student_path, teacher_path, train_path, tmp_path, monkeypatch):
    """Write a small YAML and return its path; an empty folder is the current one."""
    monkeypatch.chdir(tmp_path)

    def recipe(teacher, update):
        model = {
            "student": student_path,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path, **teacher}},
            "divergence": "ReverseKL",
            "mixture": "GoldenMixture",
            "repetition": "PeriodicSuffix",
            "constraints": {"anchor": "ReferenceKL"},
            "rollout": {"samples_per_prompt": 2, "max_new_tokens": 10},
            "update": update,
        }
        data = {"class_path": "PromptDataModule", "init_args": {"train": {"path": train_path}, "batch_size": 4}}
        trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
        return str(path)

    return recipe


def test_yaml_chooses_what_rests(recipe):
    main(["fit", "-c", recipe({}, {})])
    main(["fit", "-c", recipe({"offload": True}, {"offload": ["optimizer", "reference"]})])
    config = yaml.safe_load(Path("runs/opd/version_1/config.yaml").read_text())["model"]
    assert config["update"]["offload"] == ["optimizer", "reference"]
    assert config["teacher"]["init_args"]["offload"] is True
    usual, resting = (
        torch.load(newest(Path(f"runs/opd/version_{number}/checkpoints")), weights_only=True)["state_dict"]
        for number in (0, 1)
    )
    for name in weights_of_the_student(usual):
        torch.testing.assert_close(resting[name], usual[name], rtol=0, atol=0)


def weights_of_the_student(state):
    names = [name for name in state if name.startswith("student.")]
    assert names
    return names


@pytest.mark.parametrize("offload", [["optimizer", "student"], ["everything"]])
def test_unknown_word_is_refused_with_those_that_are_known(offload, recipe, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["fit", "-c", recipe({}, {"offload": offload})])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert "offload" in message
    assert offload[-1] in message
    assert "optimizer" in message
    assert "reference" in message
    assert "Traceback" not in message

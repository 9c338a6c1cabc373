"""Every mixture in a trainer, and the means over rows that two authors wrote."""

import math
from contextlib import contextmanager
from functools import partial
from itertools import chain

import pytest
import torch
from lightning.pytorch import Callback

from helpers import (
    EOS,
    TOKENIZER,
    VOCABULARY,
    Recorder,
    make_rollout,
    make_trainer,
    tiny_model,
    total_of_one_process,
    weights,
)
from stable_opd import (
    Author,
    Divergence,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    Repetition,
    ReverseKL,
    SampledReverseKL,
    TokenLoss,
    components,
)
from stable_opd.divergences import ForwardKL
from stable_opd.mixtures import (
    CombinedMixture,
    GKDMixture,
    GoldenMixture,
    PrefixMixture,
    ReplayMixture,
    SpeculativeMixing,
    TeacherMixing,
    TeacherMixture,
)
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.readers import Readers
from stable_opd.sources import Source
from stable_opd.tally import Tally

STUDENT, GOLDEN, TEACHER, PAST = Author
BUDGET = 10
#: How each is built where its defaults are nothing to test with.
BUILD = {
    "CombinedMixture": lambda: CombinedMixture([PrefixMixture(prefix=3), ReplayMixture(rate=1.0), TeacherMixing(0.5)]),
    "GKDMixture": lambda: GKDMixture(on_policy=0.5, source="teacher"),
    "PrefixMixture": lambda: PrefixMixture(prefix=4, source="teacher", loss=ForwardKL()),
    "ReplayMixture": lambda: ReplayMixture(rate=0.5),
    "SpeculativeMixing": lambda: SpeculativeMixing(k=3),
}
#: Which of them bring tokens of others into the second step, of those that do so at all.
SILENT = {"StudentOnly", "TeacherMixing", "SpeculativeMixing"}
#: Figures that do not depend on the order of summation, and that every step with such tokens has.
SUMS = ("train/loss", "train/value", "train/grad", "train/entropy", "train/logprob", "train/overlap")
FINITE = (*SUMS, "train/truncation", "train/repetition_rate", "train/advantage_mean", "train/log_ratio", "throughput")


def build(name):
    return BUILD.get(name, components("mixture")[name])()


class _Visiting(LocalTeacher):
    """A teacher that notices if it is asked while it is not on the device, or taken from it too early."""

    def __init__(self, path):
        super().__init__(path, offload=True)
        self.here, self.visits = False, 0

    @contextmanager
    def present(self):
        with super().present():
            self.here, self.visits = True, self.visits + 1
            try:
                yield
            finally:
                self.here = False

    @property
    def language_model(self):
        assert self.here or self.visits == 0  # before the first step, whoever wants to know whether it can write
        return super().language_model

    def score(self, rollout):
        assert self.here
        return super().score(rollout)


@pytest.fixture
def train(student_path, teacher_path, train_path):
    """Train for some steps; returns the module and what was logged."""

    def train(mixture, steps=3, teacher=LocalTeacher, path=None, callbacks=(), **options):
        parts = {
            "divergence": SampledReverseKL(),
            "constraints": {"anchor": ReferenceKL(0.1)},
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "rollout": RolloutOptions(samples_per_prompt=2, max_new_tokens=BUDGET),
        }
        module = OPDModule(
            student_path, teacher(teacher_path), mixture=mixture, repetition=PeriodicSuffix(4, 3, 3), **parts | options
        )
        recorder, data = Recorder(), PromptDataModule(Source(train_path), batch_size=4)
        trainer = make_trainer(recorder, *callbacks, max_steps=steps)
        trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=None if path is None else True)
        return module, recorder.steps

    return train


each_mixture = pytest.mark.parametrize("name", components("mixture"))


@each_mixture
def test_micro_batches_do_not_change_a_run_and_its_figures_are_finite(name, train):
    (large_module, large), (small_module, small) = (
        train(build(name), update=UpdateOptions(micro_batch_tokens=tokens)) for tokens in (16_384, 30)
    )
    for tensor, expected in zip(weights(small_module).values(), weights(large_module).values(), strict=True):
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(small, large, strict=True):
        assert found.keys() == expected.keys()
        for figure, value in expected.items():
            silent = figure.startswith("train/value/") and expected[figure.replace("value", "loss")] == 0
            if figure.startswith(FINITE):
                assert math.isfinite(value) or silent, figure  # a mean over no token is nan
            if figure.startswith(SUMS):
                assert found[figure] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), figure
        assert expected["train/grad_norm"] > 0
    assert any(step["train/loss/mixture"] != 0 for step in large) == (name not in SILENT)
    moved = [
        (tensor - old).abs().max()
        for tensor, old in zip(weights(large_module).values(), tiny_model(1).parameters(), strict=True)
    ]
    assert max(moved) > 1e-4


@each_mixture
def test_run_is_the_same_with_a_teacher_that_rests_in_the_hosts_memory(name, train):
    update = UpdateOptions("token_mean")
    expected, _ = train(build(name), update=update)
    found, _ = train(build(name), teacher=_Visiting, update=update)
    for tensor, other in zip(weights(found).values(), weights(expected).values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
    assert not found.readers.teacher.here


@pytest.mark.parametrize(
    "make",
    [
        lambda: CombinedMixture([TeacherMixture(), TeacherMixing(0.5)]),
        lambda: CombinedMixture([PrefixMixture(prefix=3, source="teacher"), SpeculativeMixing(2)]),
    ],
    ids=["rows", "beginnings"],
)
def test_teacher_that_writes_and_has_a_say_comes_once_for_each(make, train):
    """It must not leave between its own rows and the student's tokens."""
    module, steps = train(make(), steps=2, teacher=_Visiting)
    assert module.readers.teacher.visits == 4  # to write and to score, in two steps
    assert all(math.isfinite(step["train/loss"]) for step in steps)


@pytest.mark.parametrize("name", ["ReplayMixture", "CombinedMixture", "GKDMixture", "PrefixMixture"])
def test_resumed_run_is_the_uninterrupted_one(name, train, tmp_path):
    """With the rows of earlier steps, the coin and the length of the beginnings."""
    whole, expected = train(build(name), steps=4)

    class Leaving(Callback):
        """Saves a checkpoint after the second step."""

        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    train(build(name), steps=4, callbacks=[Leaving()])
    resumed, found = train(build(name), steps=4, path=tmp_path / "half.ckpt")
    assert len(found) == 2
    for tensor, other in zip(weights(resumed).values(), weights(whole).values(), strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)
    assert [step["train/loss"] for step in found] == pytest.approx(
        [step["train/loss"] for step in expected[2:]], rel=1e-4
    )


class _Counting(Divergence):
    """A loss that tells the place of a token, for the student or for all others."""

    support, needs_teacher, positionwise = "sampled", False, True

    def __init__(self, own, whole_rows):
        super().__init__()
        self.own, self.positionwise = own, not whole_rows

    def forward(self, evidence):
        loss = 1 + evidence.position + 0 * evidence.student.sampled
        where = evidence.written_by(STUDENT)
        return TokenLoss(loss, loss.detach(), where if self.own else ~where)


AUTHORS = [[1, 1, 0, 0, 0], [0, 0, 0], [2, 0], [1, 1, 1, 1], [2, 2, 2], [3, 3, 0, 0], [0]]


def mean_of(author, aggregation):
    """The mean of `_Counting` over the tokens of one author."""
    counted = [[1.0 + place for place, who in enumerate(each) if who == author] for each in AUTHORS]
    counted = [each for each in counted if each]
    if aggregation == "token_mean":
        return sum(chain(*counted)) / sum(map(len, counted))
    return sum(sum(each) / len(each) for each in counted) / len(counted)


@pytest.mark.parametrize("whole_rows", [False, True], ids=["tiles", "whole rows"])
@pytest.mark.parametrize("max_tokens", [1, 12, 10**6])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_means_of_rows_by_two_authors_count_each_token_once(aggregation, max_tokens, whole_rows):
    """A row that somebody began is in the means of both, with the tokens of each; every author has its own mean."""
    rows = [[5 + place for place in range(len(each))] for each in AUTHORS]
    authors = [Author(each[-1]) for each in AUTHORS]
    rollout = make_rollout(rows, authors=authors, token_authors=torch.tensor([*chain(*AUTHORS)]))
    marks = Repetition(torch.zeros(len(rollout.row), dtype=torch.bool), torch.zeros(len(rollout), dtype=torch.bool))
    objective = Objective(
        {"divergence": _Counting(True, whole_rows)}, {"mixture": _Counting(False, whole_rows)}, aggregation
    )
    shares = objective.shares(rollout, total_of_one_process)
    model, tally = tiny_model(1), Tally(shares, torch.device("cpu"))
    work = list(pieces(rollout, marks, objective, Cutting(max_tokens)))
    for piece, readings in zip(work, Readers(LocalTeacher("nowhere")).read(work, VOCABULARY), strict=True):
        tally.add(evaluate(piece, readings, shares, model, VOCABULARY))
    for name, authors in (("divergence", [0]), ("mixture", [1, 2, 3])):
        expected = sum(mean_of(author, aggregation) for author in authors)
        assert float(tally.losses[name]) == pytest.approx(expected, rel=1e-5)
        assert float(tally.values[name]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 30, 10**6])
def test_rows_by_two_authors_are_learnt_as_their_formulas_say(max_tokens, teacher_path):
    """Beginning by cross-entropy, the rest by reverse KL; on materialised logits, row by row."""
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, torch.device("cpu"))
    authors = [[1, 1, 0, 0, 0], [0, 0, 0], [1, 0], [1, 1, 1]]
    completions, prompts = [[3, 4, 5, 6, EOS], [7, 8, 9], [2, 3], [4, 5, EOS]], [[12, 3], [1], [12, 7, 10], [12]]
    rollout = make_rollout(
        completions, prompts, [Author(each[-1]) for each in authors], token_authors=torch.tensor([*chain(*authors)])
    )
    marks = Repetition(torch.zeros(len(rollout.row), dtype=torch.bool), torch.zeros(len(rollout), dtype=torch.bool))
    objective = Objective({"divergence": ReverseKL()}, {"mixture": GoldenMixture(0.7)})
    model = tiny_model(1)
    work = list(pieces(rollout, marks, objective, Cutting(max_tokens)))
    shares = objective.shares(rollout, total_of_one_process)
    for piece, readings in zip(work, Readers(teacher).read(work, VOCABULARY), strict=True):
        evaluate(piece, readings, shares, model, VOCABULARY).loss.backward()
    found = {name: each.grad.clone() for name, each in model.named_parameters()}
    model.zero_grad()
    own, golden = [], []
    for prompt, row, who in zip(prompts, completions, authors, strict=True):
        ids, mine = torch.tensor([prompt + row]), torch.tensor(who) == STUDENT
        p, q = (each(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for each in (model, teacher.model))
        kl, ce = (p.exp() * (p - q)).sum(-1), -p[torch.arange(len(row)), row]
        own += [kl[mine].mean()] if mine.any() else []
        golden += [] if mine.all() else [ce[~mine].mean()]
    (torch.stack(own).mean() + 0.7 * torch.stack(golden).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)

"""What is done with loops and with truncated rows, by the definition and in training."""

import itertools
import math
from functools import partial
from typing import get_args

import pytest
import torch

from helpers import EOS, Recorder, make_rollout, make_trainer, tiny_model, total_of_one_process, weights
from stable_opd import (
    Author,
    Finish,
    GoldenMixture,
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    Prompts,
    ReferenceKL,
    Repetition,
    RepetitionDetector,
    ReverseKL,
    Sampler,
    StudentOnly,
)
from stable_opd.controllers import Proportional
from stable_opd.objective import Objective
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.policies import LoopPolicy, Policies, TruncationPolicy
from stable_opd.sources import Source

LOOPS, TRUNCATED = get_args(LoopPolicy), get_args(TruncationPolicy)
COMBINATIONS = list(itertools.product(LOOPS, TRUNCATED))
AGGREGATIONS = ["sequence_mean", "token_mean"]


def draw(seed):
    """Ragged rows by several authors, with marks."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 9, (7,), generator=generator).tolist()
    rows = [torch.randint(2, 9, (length,), generator=generator).tolist() for length in lengths]
    authors = [Author.STUDENT] * 4 + [Author.GOLDEN, Author.STUDENT, Author.PAST]
    token_authors = torch.tensor([int(each) for each in authors]).repeat_interleave(torch.tensor(lengths))
    finish = [Finish(int(each)) for each in torch.randint(3, (7,), generator=generator)]
    rollout = make_rollout(rows, authors=authors, finish=finish, token_authors=token_authors)
    in_loop = torch.rand(len(rollout.row), generator=generator) < 0.4
    return rollout, Repetition(in_loop, torch.rand(7, generator=generator) < 0.5)


def naive_weights(policies, rollout, repetition):
    """The definition, token by token."""
    found, place = [], 0
    for row, length in enumerate(rollout.lengths.tolist()):
        cut = rollout.finish[row] != Finish.STOP
        for position in range(length):
            weight = 1.0
            if repetition.in_loop[place]:
                weight *= {"mask": 0.0, "down_weight": policies.factor}.get(policies.loops, 1.0)
            if cut:
                weight *= {"mask": 0.0, "down_weight": policies.factor}.get(policies.truncated, 1.0)
            if cut and policies.truncated == "last_window" and length - position > policies.window:
                weight = 0.0
            found.append(weight)
            place += 1
    return torch.tensor(found)


@pytest.mark.parametrize(("loops", "truncated"), COMBINATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_weights_are_those_of_the_definition(loops, truncated, seed):
    policies = Policies(loops, truncated, factor=0.25, window=3)
    rollout, repetition = draw(seed)
    found = policies.weights(rollout, repetition)
    expected = naive_weights(policies, rollout, repetition)
    if found is None:
        assert (expected == 1).all()
        assert loops in ("keep", "golden")
        assert truncated in ("keep", "drop")
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("truncated", TRUNCATED)
@pytest.mark.parametrize("seed", range(6))
def test_only_truncated_rows_that_the_student_wrote_are_dropped(truncated, seed):
    """Now or in an earlier step."""
    rollout, _ = draw(seed)
    found = Policies(truncated=truncated).dropped(rollout).tolist()
    facts = zip(rollout.author.tolist(), rollout.finish.tolist(), strict=True)
    own = (Author.STUDENT, Author.PAST)
    assert found == [truncated == "drop" and a in own and f != Finish.STOP for a, f in facts]


def naive_means(losses, weights, own, rows, aggregation):
    """A mean over what is not masked; a weight scales the loss and not the count."""
    kept = [place for place in range(len(losses)) if own[place] and weights[place] > 0]
    if aggregation == "token_mean":
        return sum(losses[place] * weights[place] for place in kept) / max(1, len(kept))
    by_row = [[losses[place] * weights[place] for place in kept if rows[place] == row] for row in range(7)]
    means = [sum(row) / len(row) for row in by_row if row]
    return sum(means) / max(1, len(means))


@pytest.mark.parametrize(("loops", "truncated"), COMBINATIONS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_means_are_over_what_is_left(loops, truncated, aggregation, seed):
    """Of the divergence: the anchor speaks about all tokens of the rows that are not dropped."""
    policies = Policies(loops, truncated, factor=0.25, window=3)
    rollout, repetition = draw(seed)
    objective = Objective(
        {"divergence": ReverseKL(), "anchor": ReferenceKL(0.1)}, {"mixture": GoldenMixture()}, aggregation
    )
    kept = ~policies.dropped(rollout)
    read = (rollout.token_author == Author.STUDENT) & kept[rollout.row]
    found = policies.weights(rollout, repetition)
    shares = objective.shares(rollout, total_of_one_process, kept, found)
    losses, rows = [2.0**place for place in range(len(rollout.row))], rollout.row.tolist()
    ones = torch.ones(len(rollout.row))
    for name, weight in (("divergence", ones if found is None else found), ("anchor", ones)):
        expected = naive_means(losses, weight.tolist(), read.tolist(), rows, aggregation)
        assert (shares[name].double() * torch.tensor(losses).double()).sum().item() == pytest.approx(expected, rel=1e-5)
    twice = objective.shares(rollout, lambda count: 2 * count, kept, found)["divergence"]
    torch.testing.assert_close(2 * twice, shares["divergence"])


GOLDEN = [[11, 12, EOS], [13, 14, 15, 16], None, []]
PROMPTS = Prompts([[1], [2, 3], [4], [5]], GOLDEN, range(4), [{}] * 4)


def replaceable():
    """Prompt 0 and 1 have solutions; the rows of every author say that they are repetitive."""
    rollout = make_rollout(
        [[2, 2, 2], [3, 4], [6, 6], [], [7, 7, 7], [8, 8], [9]],
        [[1], [2, 3], [4], [2, 3], [1], [2, 3], [5]],
        [Author.STUDENT, Author.STUDENT, Author.STUDENT, Author.STUDENT, Author.GOLDEN, Author.PAST, Author.STUDENT],
        [Finish.LENGTH, Finish.STOP, Finish.LOOP, Finish.LENGTH, Finish.STOP, Finish.LENGTH, Finish.LENGTH],
        behaviour=-torch.arange(1.0, 14.0),
    )
    rollout = type(rollout)(**vars(rollout) | {"prompt": torch.tensor([0, 1, 2, 1, 0, -1, 3])})
    flagged = torch.tensor([True, False, True, True, True, True, True])
    return rollout, Repetition(flagged[rollout.row], flagged)


def test_golden_solutions_take_the_place_of_repetitive_rows_of_the_students():
    rollout, repetition = replaceable()
    found, marks = Policies(loops="golden").replace(rollout, repetition, PROMPTS, [EOS])
    rows = [row.tolist() for row in found.completion.split(found.lengths.tolist())]
    assert rows == [[11, 12, EOS], [3, 4], [6, 6], [13, 14, 15, 16], [7, 7, 7], [8, 8], [9]]
    for row, (prompt, completion) in enumerate(zip([[1], [2, 3], [4], [2, 3], [1], [2, 3], [5]], rows, strict=True)):
        assert found.select(torch.tensor([row])).tokens.tolist() == prompt + completion
    S, G, P = int(Author.STUDENT), int(Author.GOLDEN), int(Author.PAST)
    assert found.author.tolist() == [G, S, S, G, G, P, S]
    assert found.token_author.tolist() == [G] * 3 + [S] * 4 + [G] * 7 + [P] * 2 + [S]
    assert found.finish.tolist() == [
        *(Finish.STOP, Finish.STOP, Finish.LOOP, Finish.LENGTH),  # the second solution has no stop token
        *(Finish.STOP, Finish.LENGTH, Finish.LENGTH),
    ]
    assert found.behaviour_logprobs.tolist() == [0] * 3 + [-4, -5, -6, -7] + [0] * 4 + [-8, -9, -10, -11, -12, -13]
    assert marks.repetitive.tolist() == [False, False, True, False, True, True, True]
    assert marks.in_loop.tolist() == marks.repetitive[found.row].tolist()
    assert found.prompt.tolist() == rollout.prompt.tolist()
    assert [text == "" for text in found.texts] == [True, False, False, True, False, False, False]
    for name in ("tokens", "lengths", "author", "finish", "token_author", "behaviour_logprobs", "prompt_lengths"):
        assert getattr(found, name).dtype == getattr(rollout, name).dtype
    untouched, kept = replaceable()
    assert (rollout.tokens == untouched.tokens).all()
    assert (rollout.author == untouched.author).all()
    assert (repetition.repetitive == kept.repetitive).all()


@pytest.mark.parametrize("loops", [loops for loops in LOOPS if loops != "golden"])
def test_other_policies_replace_nothing(loops):
    rollout, repetition = replaceable()
    assert Policies(loops=loops).replace(rollout, repetition, PROMPTS, [EOS]) == (rollout, repetition)


def test_nothing_is_replaced_where_nothing_repeats():
    rollout, _ = replaceable()
    nothing = Repetition(torch.zeros(13, dtype=torch.bool), torch.zeros(7, dtype=torch.bool))
    assert Policies(loops="golden").replace(rollout, nothing, PROMPTS, [EOS])[0] is rollout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factor": 0.0}, r"Expected a factor between 0 and 1 .*but got 0\.0 and 256.*choose the policy mask"),
        ({"factor": 1.0}, r"factor between 0 and 1"),
        ({"window": 0}, r"window of at least 1, but got 0\.1 and 0"),
        ({"loops": "masked"}, r"Expected a policy out of keep, mask, down_weight, golden, but got 'masked'"),
        ({"truncated": "golden"}, r"out of keep, mask, down_weight, last_window, drop, but got 'golden'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Policies(**options)


class _Flag(RepetitionDetector):
    """Flags the rows and marks the tokens that it is told to, from the second token on."""

    def __init__(self, which):
        super().__init__()
        self.which = which

    def forward(self, rollout):
        flagged = self.which(rollout)
        return Repetition(flagged[rollout.row] & (rollout.position > 0), flagged)


@pytest.fixture
def train(student_path, teacher_path, train_path):
    """Train a tiny model for two steps, and return its weights and what was logged."""

    def train(
        policies, tokens=16_384, mixture=None, detector=None, sampler=None, aggregation="sequence_mean", anchor=None
    ):
        module = OPDModule(
            student_path,
            LocalTeacher(teacher_path),
            ReverseKL(),
            mixture or StudentOnly(),
            detector or PeriodicSuffix(4, 3, 3),
            {"anchor": anchor or ReferenceKL(0.1)},
            sampler=sampler,
            optimizer=partial(torch.optim.SGD, lr=0.1),
            rollout=RolloutOptions(samples_per_prompt=3, max_new_tokens=10),
            policies=policies,
            update=UpdateOptions(aggregation, tokens),
        )
        recorder = Recorder()
        data = PromptDataModule(Source(train_path), batch_size=4)
        make_trainer(recorder, max_steps=2).fit(module, datamodule=data)
        return weights(module), recorder.steps

    return train


def difference(found, expected):
    return max((found[name] - tensor).abs().max().item() for name, tensor in expected.items())


START = dict(tiny_model(1).named_parameters())
HALF = _Flag(lambda rollout: torch.arange(len(rollout), device=rollout.lengths.device) % 2 == 0)


@pytest.mark.parametrize(("loops", "truncated"), COMBINATIONS)
def test_micro_batches_do_not_change_the_run(loops, truncated, train):
    policies = Policies(loops, truncated, window=4)
    options = {"mixture": GoldenMixture(), "detector": HALF, "aggregation": AGGREGATIONS[loops in ("mask", "golden")]}
    (one, steps), (many, other) = train(policies, **options), train(policies, 40, **options)
    assert difference(many, one) < 2e-5
    assert [step["train/loss"] for step in other] == pytest.approx([step["train/loss"] for step in steps], rel=1e-4)
    assert difference(one, START) > 1e-3
    if (loops, truncated) != ("keep", "keep"):
        assert difference(one, train(Policies(), **options)[0]) > 1e-4


def everything(rollout):
    return torch.ones_like(rollout.truncated)


class _Endless(Sampler):
    """Never ends an answer."""

    follows_student = True  # so that nothing is warned of

    def forward(self, logits, prefix):
        return logits.index_fill(-1, torch.tensor([EOS]), -float("inf"))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_is_learnt_where_all_rows_are_dropped(aggregation, train):
    """The row that is read all the same has no share."""
    found, steps = train(Policies(truncated="drop"), sampler=_Endless(), aggregation=aggregation)
    assert [step["train/truncation_rate"] for step in steps] == [1.0, 1.0]
    assert difference(found, START) == 0
    assert [step["train/loss"] for step in steps] == [0.0, 0.0]
    assert [step["train/grad_norm"] for step in steps] == [0.0, 0.0]
    assert difference(train(Policies(), sampler=_Endless(), aggregation=aggregation)[0], START) > 1e-3


def test_controller_learns_nothing_from_a_step_without_tokens(train):
    """A value of 0 would have it let go in every step of a collapse."""
    anchor = ReferenceKL(0.1, controller=Proportional(target=0.05))
    _, steps = train(Policies(truncated="drop"), sampler=_Endless(), anchor=anchor)
    assert all(math.isnan(step["train/value/anchor"]) for step in steps)
    assert anchor.controller.factor == 1
    train(Policies(), sampler=_Endless(), anchor=anchor)
    assert anchor.controller.factor != 1


def test_golden_rows_are_learnt_beside_rows_that_are_all_dropped(train):
    found, steps = train(Policies(truncated="drop"), sampler=_Endless(), mixture=GoldenMixture())
    assert [step["train/loss/divergence"] for step in steps] == [0.0, 0.0]
    assert [step["train/loss/anchor"] for step in steps] == [0.0, 0.0]
    assert difference(found, START) > 1e-3


def test_golden_solutions_may_take_all_places(train):
    found, steps = train(Policies(loops="golden"), mixture=GoldenMixture(), detector=_Flag(everything))
    assert [step["train/repetition_rate"] for step in steps] == [1.0, 1.0]
    assert [step["train/loss/divergence"] for step in steps] == [0.0, 0.0]
    assert difference(found, START) > 1e-3


def test_masked_loops_are_still_held_by_the_constraints(train):
    """All tokens but the first of each row are marked."""
    _, (_, step) = train(Policies(loops="mask"), detector=_Flag(everything))
    _, (_, plain) = train(Policies(), detector=_Flag(everything))
    assert step["train/value/anchor"] > 0
    assert step["train/loss/divergence"] != pytest.approx(plain["train/loss/divergence"], rel=1e-3)

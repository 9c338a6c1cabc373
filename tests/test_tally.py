"""What a step adds up to: by hand from collected figures, and against loops over materialised logits."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from helpers import TOKENIZER, VOCABULARY, make_rollout, tiny_model, total_of_one_process
from stable_opd import Author, GoldenMixture, LocalTeacher, Repetition, ReverseKL, diagnostics
from stable_opd.objective import Cutting, Objective, evaluate, pieces
from stable_opd.readers import Readers
from stable_opd.tally import Tally

CPU = torch.device("cpu")
STOP = (5, 9)
S, G, T = (int(each) for each in (Author.STUDENT, Author.GOLDEN, Author.TEACHER))
PROMPTS = [[12, 3, 13, 5], [12, 1], [12, 7, 10, 2, 11, 9], [12, 3]]
ROWS = [[1, 2, 3, 5], [4, 4, 6, 7, 8, 1, 2, 9], [5, 9, 1, 2, 3, 4], [2, 5]]
#: The third row was begun by the teacher, which wrote stop tokens in it; the fourth is golden.
AUTHORS = torch.tensor([S] * 4 + [S] * 8 + [T] * 3 + [S] * 3 + [G] * 2)
BUDGET = 20


def put(tally, **figures):
    for name, values in figures.items():
        tally.diagnostics.put(name, torch.as_tensor(values))


def of_four_positions():
    """Two positions that the whole vocabulary is looked at, and four in all."""
    tally = Tally({"a": torch.ones(1)}, CPU)
    put(tally, student=[-1.0, -2, -3, -4], teacher=[-2.0, -2, -1, -9], own=[True, True, True, False])
    put(tally, in_loop=[False, True, False, True], stopped=[False, True, True, False])
    put(tally, stop_student=[0.1, 0.5, 0.9, 0.7], stop_teacher=[0.2, 0.3, 0.5, 0.9])
    put(tally, entropy_student=[1.0, 2.0, 9.0], entropy_teacher=[3.0, 1.5, 1.0], kl=[0.5, 0.25, 7.0])
    put(tally, overlap=[0.0, 0.5, 1.0], overlap_advantage=[0.0, -0.5, -3.0], position=[1, 6, 6])
    put(tally, stands_for=[2.0, 1.0, 0.0], overlapping=[0.0, 1.0, 0.0])
    return tally


EXPECTED = {
    "logprob_student": -2.0,
    "logprob_teacher": -5 / 3,
    "entropy_student": 4 / 3,
    "entropy_teacher": 2.5,
    "overlap": 1 / 6,
    "overlap_advantage": -0.5,
    "entropy_gap": (2 * 2 + 0.5) / 3,
    "stop_hazard": 0.5,
    "stop_mass_student": 0.7,
    "stop_mass_teacher": 0.4,
    "kl_by_position/0": 0.5,
    "kl_by_position/3": 0.25,
}


def without_nan(figures):
    return {name: value.item() for name, value in figures.items() if not value.isnan()}


def test_comparison_by_hand():
    found = of_four_positions().compared(total_of_one_process, BUDGET)
    assert list(found) == [*Tally.MEANS, *(f"kl_by_position/{number}" for number in range(10))]
    assert without_nan(found) == pytest.approx(EXPECTED)


@pytest.mark.parametrize(("position", "budget", "number"), [(0, 20, 0), (1, 20, 0), (2, 20, 1), (19, 20, 9)])
@pytest.mark.parametrize("scale", [1, 7])
def test_bins_are_tenths_of_the_budget(position, budget, number, scale):
    tally = of_four_positions()
    tally.diagnostics["position"].fill_(0)
    tally.diagnostics._parts["position"] = [torch.tensor([position, position, 0]) * scale]
    found = tally.compared(total_of_one_process, budget * scale)
    assert found[f"kl_by_position/{number}"].item() == pytest.approx(1.25 / 3)


def test_positions_behind_the_budget_are_in_the_last_bin_and_small_budgets_leave_bins_empty():
    """Somebody else's beginning may not have counted in the student's budget."""
    found = without_nan(of_four_positions().compared(total_of_one_process, 5))
    assert {name: value for name, value in found.items() if "kl" in name} == {
        "kl_by_position/2": 0.5,
        "kl_by_position/9": 0.25,
    }


def test_where_nobody_stopped_the_masses_are_nan():
    tally = of_four_positions()
    tally.diagnostics._parts["stopped"] = [torch.zeros(4, dtype=torch.bool)]
    found = tally.compared(total_of_one_process, BUDGET)
    assert found["stop_mass_student"].isnan()
    assert found["stop_mass_teacher"].isnan()
    assert found["stop_hazard"] == 0.5


def processes(*tallies):
    """Let processes meet: each sum over all of them is the same for each, and must be asked for by each."""
    sums = {}

    def total(method, number):
        asked = []
        getattr(tallies[number], method)(
            lambda local: asked.append(local) or local, *([BUDGET] * (method == "compared"))
        )
        return asked

    for method in ("reduced", "compared"):
        asked = [total(method, number) for number in range(len(tallies))]
        assert len({tuple(each.shape for each in one) for one in asked}) == 1
        sums[method] = sum(one[0] for one in asked)
    return [
        tally.reduced(lambda _: sums["reduced"]) | tally.compared(lambda _: sums["compared"], BUDGET)
        for tally in tallies
    ]


def test_a_process_without_the_students_tokens_reports_what_the_others_do():
    tally, empty = of_four_positions(), Tally({"a": torch.ones(1)}, CPU)
    alone = tally.reduced(total_of_one_process) | tally.compared(total_of_one_process, BUDGET)
    for found in processes(tally, empty):
        assert list(found) == list(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, equal_nan=True)


def test_means_are_those_over_all_processes_and_not_means_of_means():
    other = Tally({"a": torch.ones(1)}, CPU)
    put(other, student=[-7.0], teacher=[-8.0], own=[True], in_loop=[False], stopped=[True])
    put(other, stop_student=[0.1], stop_teacher=[1.0], entropy_student=[1.0], entropy_teacher=[0.0], kl=[2.0])
    put(other, overlap=[1.0], overlap_advantage=[-1.0], position=[7], stands_for=[3.0], overlapping=[3.0])
    for found in processes(of_four_positions(), other):
        assert found["logprob_student"].item() == pytest.approx(-13 / 4)
        assert found["stop_hazard"].item() == pytest.approx(1.6 / 4)
        assert found["stop_mass_teacher"].item() == pytest.approx(1.8 / 3)
        assert found["overlap_advantage"].item() == pytest.approx(-3.5 / 4)
        assert found["kl_by_position/3"].item() == pytest.approx(6.25 / 4)


def test_without_a_teacher_there_is_nothing_to_compare():
    tally = Tally({"a": torch.ones(1)}, CPU, expected=False)
    assert tally.compared(total_of_one_process, BUDGET) == {}
    assert tally.reduced(total_of_one_process).keys() == {"loss", "loss/a", "value/a"}
    nothing = tally.of_students()
    assert [len(nothing["advantage"]), len(nothing["in_loop"]), nothing["in_loop"].dtype] == [0, 0, torch.bool]


@pytest.fixture(scope="module")
def teacher(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    return teacher


def tally_of(teacher, max_tokens):
    """Let a tiny student read rows of several authors, in micro-batches."""
    rollout = make_rollout(ROWS, PROMPTS, [Author.STUDENT] * 3 + [Author.GOLDEN], token_authors=AUTHORS)
    marks = Repetition(rollout.position > 2, torch.ones(4, dtype=torch.bool))
    objective = Objective({"divergence": ReverseKL()}, {"mixture": GoldenMixture()})
    work = list(pieces(rollout, marks, objective, Cutting(max_tokens, stop=STOP)))
    shares, tally, model = (
        objective.shares(rollout, total_of_one_process),
        Tally(objective.shares(rollout, total_of_one_process), CPU),
        tiny_model(1),
    )
    for piece, readings in zip(work, Readers(teacher).read(work, VOCABULARY), strict=True):
        tally.add(evaluate(piece, readings, shares, model, VOCABULARY))
    return tally, len(work)


def in_a_loop(teacher):
    """Every figure from full forward passes, token by token."""
    entropy_gaps, hazards, stops, advantages, bins = [], [], [], [], {}
    authors = iter(AUTHORS.tolist())
    for prompt, row in zip(PROMPTS, ROWS, strict=True):
        with torch.no_grad():
            p, q = (
                Categorical(logits=model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1])
                for model in (tiny_model(1), teacher.model)
            )
        for place, token in enumerate(row):
            if next(authors) != S:
                continue
            ours, theirs = Categorical(p.probs[place]), Categorical(q.probs[place])
            hazards.append(sum(ours.probs[each] for each in STOP))
            if token in STOP:
                stops.append((hazards[-1], sum(theirs.probs[each] for each in STOP)))
            entropy_gaps.append((ours.entropy() - theirs.entropy()).abs())
            both = sorted(set(ours.probs.topk(16).indices.tolist()) & set(theirs.probs.topk(16).indices.tolist()))
            if both:
                advantages.append(-kl_divergence(Categorical(ours.probs[both]), Categorical(theirs.probs[both])))
            bins.setdefault(10 * place // BUDGET, []).append(kl_divergence(ours, theirs))
    assert len(hazards) == 15
    assert len(stops) == 2
    mean = lambda values: torch.stack(list(values)).mean().item()  # noqa: E731
    return {
        "overlap_advantage": mean(advantages),
        "entropy_gap": mean(entropy_gaps),
        "stop_hazard": mean(hazards),
        "stop_mass_student": mean(ours for ours, _ in stops),
        "stop_mass_teacher": mean(theirs for _, theirs in stops),
    } | {f"kl_by_position/{number}": mean(values) for number, values in sorted(bins.items())}


@pytest.mark.parametrize("max_tokens", [1, 14, 10**6])
def test_figures_equal_those_of_a_loop_whatever_the_micro_batch(max_tokens, teacher, tile):
    """Rows of the student's, one that the teacher began, and a golden one: only the student's tokens count."""
    tally, count = tally_of(teacher, max_tokens)
    assert count == {1: 4, 14: 3, 10**6: 1}[max_tokens]
    found, expected = tally.compared(total_of_one_process, BUDGET), in_a_loop(teacher)
    known = without_nan(found)
    assert {name: known[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert known.keys() - expected.keys() == set(list(Tally.MEANS)[:5])  # held against the models in test_objective
    assert sum(value.isnan().item() for value in found.values()) == 15 - len(expected) == 6


def test_evenly_spaced_positions_give_the_figures_on_average(teacher, monkeypatch):
    """Two of three positions are not looked at; over draws of the first one the weighted sums are those of all."""
    monkeypatch.setattr(diagnostics, "ENTRIES", 1)
    full = tally_of(teacher, 10**6)[0]
    monkeypatch.setattr(diagnostics, "POSITIONS", 4)
    sums = []
    for first in range(3):
        monkeypatch.setattr(diagnostics, "key", lambda *_, first=first: first)
        tally = tally_of(teacher, 10**6)[0]
        sums.append(tally._sums())
    expected = full._sums()
    strides = {12 // 4, max(1, 6 // 4)}
    assert strides == {3, 1}
    torch.testing.assert_close(torch.stack(sums).mean(0), expected, rtol=1e-4, atol=1e-5)
    assert math.isfinite(expected.sum())


def test_process_without_tokens_has_the_names_of_those_that_have_some():
    """Else one step of a schedule that waits for a figure would not find it."""
    tally = Tally({"a": torch.zeros(2)}, CPU)
    assert (
        tally.compared(total_of_one_process, BUDGET).keys()
        == of_four_positions().compared(total_of_one_process, BUDGET).keys()
    )
    assert tally.compared(total_of_one_process, BUDGET)["overlap"].isnan()


def test_value_is_a_mean_whatever_the_weights_are_and_nan_over_no_token():
    tally = Tally({"a": torch.tensor([0.5, 1.5]), "b": torch.zeros(2)}, CPU)
    tally.values["a"] = torch.tensor(0.5 * 3.0 + 1.5 * 5.0)
    found = tally.reduced(total_of_one_process)
    assert found["value/a"].item() == pytest.approx((0.5 * 3 + 1.5 * 5) / 2)
    assert found["value/b"].isnan()


def test_penalties_belong_to_the_loss():
    tally = Tally({"a": torch.ones(1), "w": torch.ones(1)}, CPU)
    tally.losses["a"] = torch.tensor(2.0)
    found = tally.reduced(
        total_of_one_process, {"loss/w": torch.tensor(0.5), "value/w": torch.tensor(5.0), "grad_norm": 1}
    )
    assert [found[name].item() for name in ("loss", "loss/w", "value/w")] == [2.5, 0.5, 5.0]
    assert found["grad_norm"] == 1

import pytest
import torch

from helpers import make_rollout
from stable_opd.look import Glance
from stable_opd.weightings import AgreementCut
from weightings.looks import Meeting, draw, halves, look_of, of_rows, part

TINY = {"window": 3, "patience": 2, "memory": 12, "samples": 4, "warm_up": 2}
STEPS = 8


class Naive:
    """The definition, row by row and window by window, with a plain list for the memory."""

    def __init__(self, window, patience, eta, memory, samples, warm_up):
        self.window, self.patience, self.eta = window, patience, eta
        self.memory, self.samples, self.warm_up = memory, samples, warm_up
        self.minima, self.steps = [], 0

    def quantile(self):
        ordered = sorted(self.minima)
        place = (1 - self.eta) * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    def __call__(self, look):
        active = self.steps >= self.warm_up and len(self.minima) >= self.samples
        threshold = self.quantile() if active else None
        found, minima = [], []
        for row, own in zip(of_rows(look, look.glance.divergence), of_rows(look, look.own), strict=True):
            places = [place for place, mine in enumerate(own) if mine]
            values = [row[place] for place in places]
            means = [sum(values[t : t + self.window]) / self.window for t in range(len(values) - self.window + 1)]
            minima += [min(means)] if means else []
            first = len(values)
            if active:
                for t in range(len(means) - self.patience + 1):
                    if all(mean < threshold for mean in means[t : t + self.patience]):
                        first = t
                        break
            kept = set(places[:first])
            found += [float(place in kept) if mine else None for place, mine in enumerate(own)]
        self.steps += 1
        self.minima = (self.minima + sorted(minima))[-self.memory :]
        return found


def run(weighting, seed, steps=STEPS):
    return [weighting(draw(100 * seed + step)) for step in range(steps)]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("eta", [0.1, 0.3, 0.8])
@pytest.mark.parametrize(("window", "patience"), [(1, 1), (3, 2), (4, 4), (2, 1), (1, 3)])
def test_cuts_are_those_of_the_definition(seed, eta, window, patience):
    options = TINY | {"eta": eta, "window": window, "patience": patience}
    weighting, naive = AgreementCut(**options), Naive(**options)
    for step in range(STEPS):
        look = draw(100 * seed + step)
        weights, expected = weighting(look).tolist(), naive(look)
        assert [w for w, e in zip(weights, expected, strict=True) if e is not None] == [
            e for e in expected if e is not None
        ]
        assert list(weighting.minima) == pytest.approx(naive.minima, rel=1e-6)


def test_something_is_cut_in_the_middle_of_rows():
    """Otherwise the test above would pass on a weighting that keeps everything."""
    cut = kept = inside = 0
    for seed in range(10):
        for step, weights in enumerate(run(AgreementCut(**TINY), seed)):
            look = draw(100 * seed + step)
            cut, kept = cut + int((weights == 0).sum()), kept + int((weights == 1).sum())
            inside += sum(0 < sum(row) < len(row) for row in of_rows(look, weights))
    assert min(cut, kept) > 200
    assert inside > 20


def agreeing(divergence):
    look = look_of(make_rollout([[1] * len(divergence)]))
    return look_of(look.rollout, seen=Glance(*torch.zeros(3, len(divergence)), torch.tensor(divergence)))


@pytest.mark.parametrize(
    ("divergence", "kept"),
    [
        ([9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0], 2),  # two windows in a row, from the third token on
        ([9.0, 9.0, 1.0, 1.0, 9.0, 1.0, 1.0], 7),  # two windows, but not in a row
        ([1.0, 1.0, 1.0], 0),
        ([1.0, 1.0], 2),  # one window only
        ([1.0], 1),  # too short for any
    ],
    ids=str,
)
def test_example_by_hand(divergence, kept):
    """Windows of two tokens are low below 4; two in a row cut, at the start of the first."""
    weighting = AgreementCut(window=2, patience=2, eta=0.5, memory=8, samples=1, warm_up=1)
    weighting(agreeing([4.0, 4.0]))
    assert weighting.threshold() == 4.0
    assert weighting(agreeing(divergence)).tolist() == [1.0] * kept + [0.0] * (len(divergence) - kept)


def test_a_window_that_equals_the_threshold_is_not_low():
    weighting = AgreementCut(window=2, patience=1, eta=0.5, memory=8, samples=1, warm_up=0)
    weighting(agreeing([4.0, 4.0]))
    assert weighting(agreeing([4.0, 4.0, 4.0])).tolist() == [1.0] * 3


@pytest.mark.parametrize(("samples", "warm_up", "first"), [(1, 0, 1), (3, 0, 3), (1, 5, 5), (4, 2, 4)])
def test_nothing_is_cut_before_enough_is_known(samples, warm_up, first):
    """One row in each step, each more alike than all before: it is cut as soon as that is allowed."""
    weighting = AgreementCut(window=2, patience=1, samples=samples, memory=8, warm_up=warm_up)
    kept = [weighting(agreeing([10.0 - step] * 3)).sum().item() for step in range(8)]
    assert kept == [3.0] * first + [0.0] * (8 - first)


def test_memory_forgets_the_oldest():
    weighting = AgreementCut(window=1, patience=1, memory=3, samples=1, warm_up=0)
    for value in (5.0, 4.0, 3.0, 2.0):
        weighting(agreeing([value]))
    assert list(weighting.minima) == [4.0, 3.0, 2.0]


@pytest.mark.parametrize("seed", range(6))
def test_restored_state_goes_on_as_if_nothing_had_been(seed, tmp_path):
    through = AgreementCut(**TINY)
    expected = run(through, seed)
    first = AgreementCut(**TINY)
    for step in range(3):
        first(draw(100 * seed + step))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = AgreementCut(**TINY)
    second(draw(999))  # what it knew before is forgotten
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, STEPS):
        assert (second(draw(100 * seed + step)) == expected[step]).all()
    assert (second.minima, second.steps) == (through.minima, through.steps)
    assert any((weights == 0).any() for weights in expected[3:])


def test_state_survives_a_cast_of_the_module():
    """A precision of bf16-true casts buffers, and a threshold with three digits would cut other rows."""
    weighting = AgreementCut(**TINY)
    run(weighting, 1)
    before = list(weighting.minima)
    assert list(weighting.to(torch.bfloat16).minima) == before
    assert weighting.state_dict()["_extra_state"].dtype == torch.float64


@pytest.mark.parametrize("seed", range(10))
def test_two_processes_hold_one_state_and_cut_what_one_does(seed):
    one, two = AgreementCut(**TINY), (AgreementCut(**TINY), AgreementCut(**TINY))
    for step in range(STEPS):
        look = draw(100 * seed + step)
        weights, rows = one(look), halves(look)
        found = Meeting(look, rows).run(two)
        for some, values in zip(rows, found, strict=True):
            assert (values == weights[look.rollout.places(some)]).all()
        assert list(two[0].minima) == list(two[1].minima) == list(one.minima)
        assert two[0].steps == two[1].steps == step + 1


def test_processes_have_something_to_tell():
    """Otherwise the test above would pass on the rows of one process."""
    one, alone = AgreementCut(**TINY), AgreementCut(**TINY)
    for step in range(STEPS):
        look = draw(step)
        one(look)
        alone(part(look, halves(look)[0]))
    assert list(one.minima) != list(alone.minima)


def test_nobody_wrote_anything():
    weighting = AgreementCut(**TINY)
    assert weighting(look_of(make_rollout([[], []]), seen=Glance(*torch.zeros(4, 0)))).shape == (0,)
    assert (weighting.steps, list(weighting.minima)) == (1, [])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, r"Expected window and patience of at least 1.*but got 0, 4 and 0\.3"),
        ({"patience": 0}, r"but got 64, 0 and 0\.3"),
        ({"eta": 1.0}, r"A smaller eta cuts more rows"),
        ({"eta": 0.0}, r"eta between 0 and 1"),
        ({"samples": 5000}, r"Expected samples of at least 1 and at most memory.*but got 5000, 4096 and 50"),
        ({"samples": 0}, r"samples of at least 1"),
        ({"warm_up": -1}, r"warm_up of at least 0"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AgreementCut(**options)

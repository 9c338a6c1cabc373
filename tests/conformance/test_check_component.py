"""Each check finds what it is there for: a component that is wrong in one way fails that check and no other.

The classes are local to functions, so that they never become components.
"""

import inspect
import math
import re
import sys
import types

import pytest
import torch

from stable_opd import (
    Author,
    Constraint,
    Divergence,
    Mixture,
    Plan,
    Repetition,
    RepetitionDetector,
    ReverseKL,
    Sampler,
    Schedule,
    StudentOnly,
    Task,
    TokenLoss,
)
from stable_opd.controllers import Controller
from stable_opd.divergences.baselines import AdvantageBaseline
from stable_opd.divergences.transforms import AdvantageTransform
from stable_opd.references import Reference
from stable_opd.testing import CHECKS, check_component, check_kind
from stable_opd.testing import kinds as kinds_module
from stable_opd.weightings.base import Weighting

DOCUMENTED = """Is one.

Source: of the tests.
"""


def failures(cls, **options):
    """What is said by the name of the check."""
    cls.__doc__ = cls.__doc__ or DOCUMENTED
    with pytest.raises(AssertionError) as found:
        check_component(cls, **options)
    return dict(re.findall(r"^  ([a-z ]+): (.*)$", str(found.value), re.MULTILINE))


def fails(cls, check, match, **options):
    found = failures(cls, **options)
    assert list(found) == [check], found
    assert re.search(match, found[check]), found[check]


def surprise(evidence):
    """A loss that is right: the written token's, with 0 where teacher and student agree."""
    return (evidence.student.sampled - evidence.teacher.sampled).square() / 2


def own(evidence):
    return evidence.written_by(Author.STUDENT)


def term(function, base=Divergence, **declared):
    """A class whose forward is a function of the evidence."""
    body = {"forward": lambda self, evidence: function(evidence), "__doc__": DOCUMENTED, **declared}
    return type("Made", (base,), body | {"__qualname__": "term.<locals>.Term"})


def test_a_component_that_is_right_passes():
    check_component(term(lambda e: TokenLoss(surprise(e), surprise(e).detach(), own(e))))


def test_class_short_name_and_import_path_are_taken():
    for component in (ReverseKL, "ReverseKL", "stable_opd.divergences.kl.ReverseKL"):
        check_component(component)
        check_component(component, "divergence")


@pytest.mark.parametrize(
    ("component", "kind", "match"),
    [
        ("ReversKL", None, "no component named 'ReversKL'"),
        ("ReversKL", "divergence", "Did you mean 'ReverseKL'"),
        ("ReverseKL", "diverge", "kind of component out of"),
        (ReverseKL, "sampler", "Expected a sampler, but ReverseKL is a divergence"),
        (dict, None, "Expected the class of a component"),
        ("stable_opd.types.Author", None, "Expected the class of a component"),
    ],
)
def test_what_is_no_component_is_refused(component, kind, match):
    with pytest.raises(ValueError, match=match):
        check_component(component, kind)


def test_check_that_does_not_exist_cannot_be_skipped():
    with pytest.raises(ValueError, match=r"checks to skip out of construction, .*, but got shape"):
        check_component("ReverseKL", skip=["shape"])


def test_all_that_is_wrong_is_said_together():
    wrong = term(lambda e: TokenLoss(e.teacher.sampled, e.student.sampled.detach(), own(e)), __doc__="no sentence")
    assert list(failures(wrong)) == ["docstring", "gradient", "agreement"]
    check_component(wrong, skip=CHECKS["divergence"])


def test_form():
    class Required(Schedule):
        """Needs something.

        Args:
            end: Value.
        """

        def __init__(self, end: float) -> None:
            super().__init__()

        def forward(self, progress):
            return 1.0

    fails(Required, "construction", "but got none for end.*init_args")
    check_component(Required, init_args={"end": 1.0}, require_source=False)

    class Plain(Schedule):
        def forward(self, progress):
            return 1.0

    Plain.__doc__ = "no sentence"
    fails(Plain, "docstring", "'no sentence'")
    Plain.__doc__ = "A sentence."
    fails(Plain, "docstring", "`Source: `.*require_source=False")
    check_component(Plain, require_source=False)

    class Undocumented(Plain):
        """Takes something.

        Source: of the tests.

        Args:
            start: What it takes.
            stop: What it does not take.
        """

        def __init__(self, start: float = 1.0, end: float = 0.0, step=None) -> None:
            super().__init__()

    fails(Undocumented, "parameters", "type for every parameter, but got none for step")
    Undocumented.__init__.__annotations__["step"] = float | None
    fails(Undocumented, "parameters", "nothing on end, step")
    Undocumented.__doc__ = Undocumented.__doc__.replace(
        "stop:", "end: Value.\n            step: Value.\n            stop:"
    )
    fails(Undocumented, "parameters", "but got stop")


@pytest.fixture
def importable():
    """Give a class a path by which YAML can name it, in a module whose name keeps it from the lists."""
    module = types.ModuleType("_of_the_conformance_tests")
    sys.modules[module.__name__] = module

    def declare(cls):
        cls.__module__, cls.__qualname__ = module.__name__, cls.__name__
        setattr(module, cls.__name__, cls)
        return cls

    yield declare
    del sys.modules[module.__name__]


def test_yaml(importable):
    class Changing(Schedule):
        """Is somebody else.

        Source: of the tests.
        """

        def __new__(cls):
            return super().__new__(Other)

        def forward(self, progress):
            return 1.0

    class Other(Changing):
        """Is somebody else."""

    fails(importable(Changing), "yaml", "Expected a Changing from its YAML, but got a Other")

    no_limit = torch.zeros(2)

    class Unsayable(Schedule):
        """Takes what no YAML can say.

        Source: of the tests.

        Args:
            limit: The limit.
        """

        def __init__(self, limit: torch.Tensor = no_limit) -> None:
            super().__init__()

        def forward(self, progress):
            return 1.0

    assert list(failures(importable(Unsayable))) == ["yaml"]


def test_copies():
    class Remembers(Schedule):
        seen = 0

        def forward(self, progress):
            return 1.0

        def observe(self, figures):
            self.seen += 1

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            pass

    fails(Remembers, "copies", "state of a checkpoint to be taken over")
    Remembers.get_extra_state = lambda self: torch.nn.Linear(1, 1)
    Remembers.__doc__ = DOCUMENTED
    assert list(failures(Remembers)) == ["copies"]


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda e: TokenLoss(surprise(e).mean(), surprise(e).detach(), own(e)), r"`loss` .* got \(\)"),
        (lambda e: TokenLoss(surprise(e), surprise(e).detach()[:1], own(e)), r"`value` .* got \(1,\)"),
        (lambda e: TokenLoss(surprise(e), surprise(e).detach(), own(e).float()), "`where` to be bool"),
        (lambda e: TokenLoss(surprise(e), surprise(e), own(e)), "`value` without a gradient"),
        (lambda e: surprise(e), "Expected a TokenLoss"),
        (lambda e: TokenLoss(surprise(e) / 0, surprise(e).detach(), own(e)), "finite `loss`"),
        (lambda e: TokenLoss(surprise(e) / len(e.tokens[e.tokens.argmax() :]), surprise(e).detach(), own(e)), "argmax"),
    ],
    ids=["mean", "value of another shape", "float mask", "value with a graph", "tensor", "infinite", "no positions"],
)
def test_shapes(found, match):
    assert re.search(match, failures(term(found))["shapes"])


@pytest.mark.parametrize(
    ("reads", "declared", "match"),
    [
        (lambda e: e.teacher.logprobs, {}, 'support = "full"'),
        (lambda e: e.student.logprobs, {"positionwise": True}, 'support = "full"'),
        (lambda e: e.reference.sampled, {}, "needs_reference = True"),
        (lambda e: e.teacher.logprobs, {"support": "topk"}, 'support of "topk"'),
        (lambda e: e.teacher.probs, {"support": "topk"}, 'support of "topk"'),
        (lambda e: e.teacher.sampled, {"needs_teacher": False}, "needs_teacher = True"),
    ],
)
def test_reading_what_was_not_declared(reads, declared, match):
    def found(evidence):
        reads(evidence)
        return TokenLoss(-evidence.student.sampled, -evidence.student.sampled.detach(), own(evidence))

    assert re.search(match, failures(term(found, Constraint, **{"needs_teacher": True} | declared))["shapes"])


def test_a_top_k_term_may_read_the_top():
    def found(evidence):
        tokens, teacher = evidence.teacher.top(4)
        loss = (evidence.student.logprobs.gather(-1, tokens) - teacher).square().sum(-1) + surprise(evidence)
        return TokenLoss(loss, loss.detach(), own(evidence))

    check_component(term(found, support="topk"))


def test_gradient():
    def detached(evidence):
        return TokenLoss(surprise(evidence).detach(), surprise(evidence).detach(), own(evidence))

    fails(term(detached), "gradient", "but got one without")

    def into_the_teacher(evidence):
        teacher = evidence.teacher.sampled
        loss = (evidence.student.sampled - (teacher if teacher.requires_grad else teacher.requires_grad_())).square()
        return TokenLoss(loss, loss.detach(), own(evidence))

    fails(term(into_the_teacher), "gradient", r"one in `teacher\.sampled`")

    def in_place(evidence):
        gap = evidence.teacher.sampled.sub_(evidence.student.sampled.detach())
        loss = -gap * (evidence.student.sampled - evidence.behaviour_logprobs).clamp(max=9).exp()
        return TokenLoss(loss, -gap.clone(), own(evidence))

    assert "another `teacher.sampled`" in failures(term(in_place))["gradient"]


def cumulative(evidence):
    """Follows each row from token to token."""
    gap = surprise(evidence)
    before = gap.cumsum(0) - gap
    first = torch.searchsorted(evidence.row, evidence.row)
    return before - before[first] + gap


def test_rows():
    def normalised(evidence):
        loss = surprise(evidence) / (1 + surprise(evidence).detach().sum())
        return TokenLoss(loss, surprise(evidence).detach(), own(evidence))

    fails(term(normalised), "rows", "cut by memory")


@pytest.mark.parametrize("declared", [{"support": "full"}, {"positionwise": True}], ids=["full", "positionwise"])
def test_tiles(declared):
    def found(evidence):
        return TokenLoss(cumulative(evidence), cumulative(evidence).detach(), own(evidence))

    check_component(term(found))
    fails(term(found, **declared), "tiles", "tiles of 1 positions.*positionwise = False")


@pytest.mark.parametrize("wrong", ["loss", "value", "gradient", "where", "rest"])
def test_closed_form(wrong):
    class Wrong(ReverseKL):
        def closed_form(self, evidence, out):
            found = super().closed_form(evidence, out)
            if wrong == "gradient":
                out.mul_(1.001)
            elif wrong == "rest":
                out[~found.where] = torch.nan
            else:
                field = getattr(found, wrong)
                found = found._replace(**{wrong: ~field if field.dtype == torch.bool else field * 1.001})
            return found

    assert re.search("finite" if wrong == "rest" else f"another {wrong}", failures(Wrong)["closed form"])


@pytest.mark.parametrize(
    "found",
    [lambda e: -(e.student.sampled.exp()).log() + e.teacher.sampled.exp().log(), lambda e: (surprise(e)).exp() - 1],
    ids=["logarithm of a probability", "exponential"],
)
def test_extremes(found):
    def forward(evidence):
        return TokenLoss(found(evidence), found(evidence).detach(), own(evidence))

    wrong = failures(term(forward, Constraint, needs_teacher=True))
    assert "logits of +-1e4" in wrong["extremes"]


def test_rounding():
    def found(evidence):
        value = (99 * evidence.student.sampled.detach()).sin()
        return TokenLoss(surprise(evidence), 9 * value, own(evidence))

    fails(term(found, Constraint, needs_teacher=True), "rounding", "rounded to bfloat16")


def test_agreement():
    def with_entropy(evidence):
        p, q = evidence.student.logprobs, evidence.teacher.logprobs
        loss = (p.exp() * (0.9 * p - q)).sum(-1)
        value = (p.exp() * (p - q)).sum(-1).detach()
        return TokenLoss(loss, value, own(evidence))

    fails(term(with_entropy, support="full"), "agreement", "no gradient on average")
    check_component(term(with_entropy, support="full"), skip=["agreement"])

    def shifted(evidence):
        return TokenLoss(surprise(evidence) + 1, surprise(evidence).detach() + 1, own(evidence))

    fails(term(shifted), "agreement", "value of 0")


def sampler(function, **declared):
    body = {"forward": lambda self, logits, prefix: function(logits, prefix), "__doc__": DOCUMENTED, **declared}
    return type("Made", (Sampler,), body | {"__qualname__": "sampler.<locals>.Sampler"})


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda logits, _: logits[:, :-1], "logits of shape"),
        (lambda logits, _: logits - logits.amax() * math.inf, "token can be drawn"),
        (lambda logits, _: logits.masked_fill(logits < 2.9, -math.inf), "token can be drawn"),
        (lambda logits, _: logits.mul_(0.5), "only read"),
        (lambda logits, _: logits / (1 + logits.clamp(min=-1).mean().square()), "row to be treated by itself"),
    ],
    ids=["shape", "undefined", "nothing left", "in place", "rows"],
)
def test_sampler(found, match):
    fails(sampler(found), "logits", match)


def test_request():
    check_component(sampler(lambda logits, _: logits, request=lambda self: {"top_p": 1.0}))
    fails(sampler(lambda logits, _: logits, request=lambda self: ["top_p"]), "request", "Expected `request`")


def detector(function):
    body = {"forward": lambda self, rollout: function(rollout), "__doc__": DOCUMENTED}
    return type("Made", (RepetitionDetector,), body | {"__qualname__": "detector.<locals>.Detector"})


def row_flags(rollout):
    return torch.zeros(len(rollout), dtype=torch.bool)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda r: Repetition(torch.zeros(len(r.tokens), dtype=torch.bool), row_flags(r)), "`in_loop` to be bool"),
        (lambda r: Repetition(r.completion == 7, row_flags(r).float()), "`repetitive` to be bool"),
        (lambda r: (r.completion == 7, row_flags(r)), "Expected a Repetition"),
        (lambda r: Repetition(r.completion == r.completion.roll(1), row_flags(r)), "judged by itself"),
        (lambda r: Repetition(r.completion.clamp(max=r.completion.max()) < 0, row_flags(r)), "RuntimeError"),
    ],
    ids=["prompts marked", "float flags", "tuple", "across rows", "empty"],
)
def test_detector(found, match):
    fails(detector(found), "marks", match)


def weighting(function):
    body = {"forward": lambda self, look: function(look), "__doc__": DOCUMENTED}
    return type("Made", (Weighting,), body | {"__qualname__": "weighting.<locals>.Weighting"})


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (lambda look: look.rollout.position - 1.0, "at least 0"),
        (lambda look: look.rollout.position > 0, "one weight per completion token"),
        (lambda look: look.rollout.lengths.float(), "one weight per completion token"),
        (lambda look: look.rollout.position / look.rollout.position * 1.0, "finite weights"),
    ],
    ids=["negative", "bool", "per row", "undefined"],
)
def test_weighting(found, match):
    fails(weighting(found), "weights", match)


def test_weighting_that_reads_scores_has_to_declare_it():
    assert "needs_scores = True" in failures(weighting(lambda look: look.scores.entropy))["weights"]


def mixture(**declared):
    return type("Made", (StudentOnly,), {"__doc__": DOCUMENTED, "__qualname__": "m.<locals>.M", **declared})


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        (lambda *_: Plan([3], [Author.STUDENT]), "prompts from 0 to 2"),
        (lambda *_: Plan([0, 1], [Author.STUDENT]), "one author per row"),
        (lambda *_: Plan([0], [Author.TEACHER]), "but got rows of TEACHER"),
        (lambda *_: Plan([int(torch.randint(3, ())) for _ in range(9)], [Author.STUDENT] * 9), "same plan"),
    ],
    ids=["prompt", "lengths", "author", "chance"],
)
def test_plan(plan, match):
    fails(mixture(plan=plan), "plan", match)


def test_blend():
    fails(mixture(blends=True), "blend", "NotImplementedError.*does not define `blend`")
    fails(mixture(blends=True, blend=lambda _, p, q, progress: p.add_(1)), "blend", "only read")
    fails(mixture(blends=True, blend=lambda _, p, q, progress: p.exp().log() * 0), "blend", "token can be drawn")


def _twice(rollout):
    return torch.arange(len(rollout)).repeat(2)


def test_revise():
    fails(mixture(revise=lambda self, rollout, step: rollout.select(torch.tensor([0]))), "revise", "were written")
    fails(mixture(revise=lambda self, rollout, step: rollout.select(_twice(rollout))), "revise", "author PAST")


def test_mixture_is_a_loss_term_too():
    class Silent(Mixture):
        def plan(self, prompts, samples, progress, step):
            return Plan([], [])

        def forward(self, evidence):
            return TokenLoss(evidence.student.logprobs[:, 0], evidence.behaviour_logprobs, ~own(evidence))

    assert "shapes" in failures(Silent)


def small(base, **methods):
    return type("Made", (base,), {"__doc__": DOCUMENTED, "__qualname__": "small.<locals>.Small", **methods})


@pytest.mark.parametrize(
    ("cls", "check", "match"),
    [
        (small(Schedule, forward=lambda self, progress: torch.ones(2)), "factor", "finite float"),
        (
            small(Schedule, forward=lambda self, progress: math.inf if progress == 1 else 1.0),
            "factor",
            "progress of 1.0",
        ),
        (small(AdvantageTransform, __call__=lambda self, a: (a - a.mean()) / 2), "advantages", "by itself"),
        (small(AdvantageTransform, __call__=lambda self, a: a.clamp_(-1, 1)), "advantages", "left as it was"),
        (small(AdvantageTransform, __call__=lambda self, a: a.exp()), "advantages", "finite"),
        (small(AdvantageBaseline, __call__=lambda self, worth, *models: worth(*models)), "baseline", "per position"),
        (
            small(AdvantageBaseline, __call__=lambda self, worth, *models: worth(*models).mean() * models[0][:, 0]),
            "baseline",
            "position by itself",
        ),
        (small(Task, grade=lambda self, completion, fields: len(completion)), "grade", "from 0.0 to 1.0"),
        (small(Task, grade=lambda self, completion, fields: int(completion) / 9), "grade", "ValueError"),
    ],
)
def test_small_parts(cls, check, match):
    fails(cls, check, match)


@torch.no_grad()
def copy_over(self, reference, student, step):
    reference.weight.copy_(student.weight)


@torch.no_grad()
def write_back(self, reference, student, step):
    student.weight.copy_(reference.weight)


def test_reference():
    fails(small(Reference, update=copy_over), "update", "moves = True")
    check_component(small(Reference, update=copy_over, moves=True))
    fails(small(Reference, update=write_back, moves=True), "update", "left alone")


def test_controller():
    class Runaway(Controller):
        """Goes down without end.

        Source: of the tests.
        """

        def __init__(self):
            super().__init__(0.05)

        def update(self, value, raises_value=False):
            self.factor -= 1

        def next_factor(self, error):
            return self.factor

    fails(Runaway, "factor", "factor above 0")


@pytest.fixture
def kind_of(monkeypatch):
    """Let a kind consist of some classes."""

    def consist(*classes, names=None):
        names = names or [f"Class{number}" for number in range(len(classes))]
        monkeypatch.setattr(kinds_module, "components", lambda kind: dict(zip(names, classes, strict=True)))

    return consist


def local(default, annotation=float, line="Is one.", parameter="alpha"):
    def __init__(self, **_):
        pass

    cls = type("Local", (), {"__init__": __init__, "__doc__": line})
    kind = inspect.Parameter
    cls.__signature__ = inspect.Signature([kind(parameter, kind.KEYWORD_ONLY, default=default, annotation=annotation)])
    return cls


def test_components_of_a_kind(kind_of):
    kind_of(local(1.0), local(1.0, line="Is another."))
    check_kind("any")
    kind_of(local(1.0), local(2.0, line="Is another."))
    with pytest.raises(
        AssertionError, match=r"default of `alpha`, but got float = 1\.0 in Class0; float = 2\.0 in Class1"
    ):
        check_kind("any")
    kind_of(local(1), local(1, int, "Is another."))
    with pytest.raises(AssertionError, match="float = 1 in Class0; int = 1 in Class1"):
        check_kind("any")
    kind_of(local(1.0, parameter="weight"), local(2.0, line="Is another.", parameter="weight"))
    check_kind("any")
    kind_of(local(1.0), local(1.0))
    with pytest.raises(AssertionError, match=r"'Is one\.' for Class0, Class1"):
        check_kind("any")
    kind_of(local(1.0), names=["snake_case"])
    with pytest.raises(AssertionError, match="CamelCase, but got 'snake_case'"):
        check_kind("any")


def test_kind_that_does_not_exist():
    with pytest.raises(ValueError, match="kind of component"):
        check_kind("diverge")


def test_nothing_of_a_test_framework_is_needed():
    """A third party may call it from anywhere."""
    from pathlib import Path

    import stable_opd.testing

    sources = Path(stable_opd.testing.__file__).parent.glob("*.py")
    assert not any("pytest" in source.read_text() for source in sources)

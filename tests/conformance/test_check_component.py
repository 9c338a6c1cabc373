"""What is said of a component whatever its kind is, and of the components of a kind."""

import inspect
import sys
import types

import pytest
import torch

from conformance.wrong import DOCUMENTED, fails, failures, own, surprise, term
from stable_opd import (
    ReverseKL,
    Schedule,
    TokenLoss,
)
from stable_opd.testing import CHECKS, check_component, check_kind
from stable_opd.testing import kinds as kinds_module


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

"""Names: derived from the classes that exist. Test classes have local names, so that they never become components."""

import abc
import sys
import types
from typing import ClassVar

import pytest

from stable_opd import (
    Divergence,
    GoldenMixture,
    PeriodicSuffix,
    ReverseKL,
    Sampler,
    StudentOnly,
    Temperature,
    TopP,
    ZlibRepetition,
    build,
    components,
    registry,
)
from stable_opd.registry import Component, failed_plugins, kinds, load_plugins, summary, unknown_name

KINDS = {"sampler", "divergence", "constraint", "mixture", "repetition", "engine", "teacher", "task", "schedule"}


def test_kinds_are_those_of_the_design():
    assert set(kinds()) >= KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_component_has_the_name_of_its_class_and_a_docstring(kind):
    found = components(kind)
    assert found
    assert list(found) == sorted(found)
    for name, cls in found.items():
        assert cls.__name__ == name
        assert issubclass(cls, kinds()[kind])
        assert summary(cls).endswith(".")


@pytest.mark.parametrize(
    ("kind", "members"),
    [
        ("sampler", {"Temperature": Temperature, "TopP": TopP}),
        ("mixture", {"GoldenMixture": GoldenMixture, "StudentOnly": StudentOnly}),
        ("repetition", {"PeriodicSuffix": PeriodicSuffix, "ZlibRepetition": ZlibRepetition}),
    ],
)
def test_papers_members_are_found_by_name(kind, members):
    assert components(kind).items() >= members.items()


def test_abstract_classes_are_no_components():
    """`AdvantageDivergence` still lacks its advantage."""
    assert "AdvantageDivergence" not in components("divergence")
    assert "Divergence" not in components("divergence")


def test_local_classes_are_no_components():
    class Local(Sampler):
        """Complete, but nobody could import it."""

        def forward(self, logits, prefix):
            return logits

    assert Local()  # it is concrete
    assert "Local" not in components("sampler")


@pytest.fixture
def open_kind():
    """A kind of its own, so that what is registered here is seen by nobody else."""

    class Opener(Component):
        """Opens a kind."""

        kind: ClassVar[str] = "opener"

        @abc.abstractmethod
        def act(self):
            """Do something."""

    def declare(name, module="somewhere"):
        cls = type(Opener)(name, (Opener,), {"act": lambda self: name, "__doc__": f"Is {name}.", "__module__": module})
        cls.__qualname__ = name
        return cls

    return declare


def test_subclassing_registers(open_kind):
    first = open_kind("First")
    assert components("opener") == {"First": first}
    assert build("opener", "First").act() == "First"


def test_private_classes_are_no_components(open_kind):
    kept = [open_kind("_Hidden"), open_kind("Inside", module="some._private.module")]
    assert components("opener") == {}
    assert all(cls().act() for cls in kept)


def test_two_classes_of_one_name_are_refused_with_both_paths(open_kind):
    kept = [open_kind("Same", module="here"), open_kind("Same", module="there")]
    with pytest.raises(ValueError, match=r"named Same: here\.Same and there\.Same"):
        components("opener")
    assert len(kept) == 2


def test_a_class_below_two_parents_counts_once(open_kind):
    left, right = open_kind("Left"), open_kind("Right")
    both = type(left)("Both", (left, right), {"__module__": "somewhere", "__doc__": "Is both."})
    assert components("opener") == {"Both": both, "Left": left, "Right": right}


def test_build_passes_arguments_on():
    assert build("sampler", "TopP", p=0.3).p == 0.3
    assert isinstance(build("divergence", "ReverseKL"), ReverseKL)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"out of \[.*'divergence'.*\], but got 'diverge'"):
        components("diverge")


@pytest.mark.parametrize(
    ("name", "near"),
    [("ReversKL", "ReverseKL"), ("SampleReverseKL", "SampledReverseKL"), ("my.pkg.ReverseKl", "ReverseKL")],
)
def test_unknown_name_comes_with_the_nearest_one(name, near):
    with pytest.raises(ValueError, match=rf"no divergence named '{name}'. Did you mean '{near}'\?.*Known: .*ReverseKL"):
        build("divergence", name)


def test_name_that_is_near_nothing_still_lists_the_known_ones():
    message = unknown_name("divergence", "xyzzy")
    assert "Did you mean" not in message
    assert "SampledReverseKL" in message
    assert "full import path" in message


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with one entry point, as pip would leave it behind."""

    def install(name, entry, source):
        (tmp_path / f"{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.PLUGIN_GROUP}]\n{name} = {entry}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    failed_plugins.clear()
    for name in [name for name in sys.modules if name.startswith("plugin_of_the_tests")]:
        del sys.modules[name]


def test_modules_that_installed_packages_announce_are_imported(installed):
    installed("plugin_of_the_tests", "plugin_of_the_tests", "imported = True\n")
    load_plugins()
    assert isinstance(sys.modules["plugin_of_the_tests"], types.ModuleType)
    assert failed_plugins == {}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module_of_the_tests\n", "ModuleNotFoundError"),
        ("def broken(:\n", "SyntaxError"),
        ("raise KeyError('nonsense')\n", "KeyError"),
    ],
    ids=["import", "syntax", "anything"],
)
def test_broken_plugin_is_warned_about_and_remembered_for_unknown_names(installed, source, reason):
    installed("plugin_of_the_tests_broken", "plugin_of_the_tests_broken", source)
    with pytest.warns(UserWarning, match=rf"plugin_of_the_tests_broken.*could not be loaded:\n(.|\n)*{reason}"):
        load_plugins()
    assert failed_plugins["plugin_of_the_tests_broken"].startswith(reason)
    assert "plug-in 'plugin_of_the_tests_broken' could not be loaded" in unknown_name("divergence", "Theirs")
    assert components("divergence")  # the rest works


def test_divergence_without_forward_cannot_be_built():
    class Half(Divergence):
        """Forgot its forward."""

    with pytest.raises(TypeError, match="forward"):
        Half()

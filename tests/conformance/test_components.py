"""Every registered component keeps to the contract of its kind, also with parts that it does not have by default."""

import importlib
import pkgutil

import pytest

import stable_opd
from stable_opd.registry import components, kinds
from stable_opd.testing import check_component, check_kind

for module in pkgutil.walk_packages(stable_opd.__path__, "stable_opd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)  # also what no package announces yet


def named(name, **init_args):
    return {"class_path": name, "init_args": init_args}


#: Values of parameters that have no sensible default.
REQUIRED = {
    "AllOf": {"detectors": ["PeriodicSuffix", "NGramLoop"]},
    "AnyOf": {"detectors": ["PeriodicSuffix", "ZlibRepetition"]},
    "CachedTeacher": {"teacher": named("LocalTeacher", path="testbed:teacher"), "folder": "scores"},
    "CombinedMixture": {"parts": ["GoldenMixture", "ReplayMixture"]},
    "LocalTeacher": {"path": "testbed:teacher"},
    "PrivilegedTeacher": {"teacher": "SelfTeacher", "template": "{golden}"},
    "RoutedTeacher": {"teachers": {"some": "SelfTeacher"}, "column": "subject"},
    "SpecialTokens": {"tokens": [7, 9]},
    "VLLMEngine": {"server": {"model": "student"}},
    "VLLMTeacher": {"server": {"model": "teacher"}},
}
COMPONENTS = [
    (kind, name)
    for kind in kinds()
    for name, cls in components(kind).items()
    if cls.__module__.startswith("stable_opd.")
]


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=[f"{kind} {name}" for kind, name in COMPONENTS])
def test_component_keeps_to_its_contract(kind, name):
    check_component(name, kind, init_args=REQUIRED.get(name))


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_components_of_a_kind_go_together(kind):
    check_kind(kind)


def variants():
    """Departures from the defaults that decide what a component reads, or what it is made of."""
    yield from (
        (name, changes)
        for name, cls in components("divergence").items()
        for changes in (
            {"discount": 0.9},
            {"discount": 1.0, "transform": "SoftLog"},
            {"baseline": "ExactBaseline"},
            {"baseline": named("TopKBaseline", k=5), "transform": "TanhAdvantage"},
            {"dual_clip": 3.0, "clip": None},
        )
        if issubclass(cls, stable_opd.AdvantageDivergence)
    )
    for gate in ("AsymmetricDivergence", "TrustGated"):
        for local in ("ReverseKL", "JensenShannon", "EstimatedReverseKL", named("TeacherTopK", k=4)):
            yield gate, {"local": local}
    yield from (("EstimatedReverseKL", {"estimator": estimator}) for estimator in ("k3pp", "k4"))
    yield from (("EstimatedReferenceKL", {"estimator": estimator}) for estimator in ("k2", "k4"))
    for name in components("constraint"):
        yield name, {"schedule": "Cosine", "controller": "DualAscent"}
    yield "LengthPenalty", {"budget": 8}
    for mixture in ("GoldenMixture", "TeacherMixture", "ReplayMixture", "PrefixMixture", "GKDMixture"):
        yield from ((mixture, {"loss": loss, "schedule": "Linear"}) for loss in ("ForwardKL", "TeacherTopK"))
    for mixture in ("GKDMixture", "PrefixMixture"):
        yield mixture, {"source": "teacher"}
    yield "CombinedMixture", {"parts": [named("GoldenMixture", loss="ReverseKL"), "ReplayMixture"]}
    yield "CombinedMixture", {"parts": ["ShapedGolden", "TeacherMixing"]}
    yield from (("TopP", {"p": 1.0}), ("Temperature", {"temperature": 0.0}), ("TopK", {"k": 1}))


VARIANTS = list(variants())


@pytest.mark.parametrize(("name", "init_args"), VARIANTS, ids=[f"{name} {init_args}" for name, init_args in VARIANTS])
def test_component_made_otherwise_keeps_to_its_contract(name, init_args):
    check_component(name, init_args=init_args, skip=("docstring", "parameters"))

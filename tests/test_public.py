"""The public surface, and the size of the files behind it."""

from pathlib import Path

import pytest

import stable_opd

SOURCES = sorted(Path(stable_opd.__file__).parent.rglob("*.py"))


def test_public_names_are_sorted_and_unique():
    assert stable_opd.__all__ == sorted(set(stable_opd.__all__))


@pytest.mark.parametrize("name", stable_opd.__all__)
def test_public_name_is_importable(name):
    assert getattr(stable_opd, name) is not None


def test_every_public_attribute_is_announced():
    found = {name for name, value in vars(stable_opd).items() if not name.startswith("_") and not _is_module(value)}
    assert found == set(stable_opd.__all__)


@pytest.mark.parametrize(
    "package", [path.parent for path in SOURCES if path.name == "__init__.py"], ids=lambda p: p.name
)
def test_names_that_a_package_announces_exist(package):
    module = _import(package)
    announced = getattr(module, "__all__", [])
    assert announced == sorted(announced, key=lambda name: (not name.isupper(), name))  # constants first, as ruff sorts
    assert [name for name in announced if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_source_file_has_at_most_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def _import(package: Path):
    import importlib

    root = Path(stable_opd.__file__).parent
    return importlib.import_module(".".join(["stable_opd", *package.relative_to(root).parts]))


def _is_module(value: object) -> bool:
    return type(value).__name__ == "module"

"""A component from a separate package, by entry point, by full path and by import; each in a process of its own.

A class stays registered as long as its process lives, so none of this may happen in the process of the tests.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from stable_opd.registry import components, kinds
from stable_opd.testing import CHECKS

PACKAGE = Path(__file__).parent / "plugin_package"
PAGE = (PACKAGE.parent.parent / "docs" / "components.md").read_text(encoding="utf-8")


@pytest.fixture
def recipe(student_path, teacher_path, train_path, tmp_path):
    """A run of one step without a divergence, which each test names in a way of its own."""
    config = {
        "model": {
            "student": student_path,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
            "mixture": "StudentOnly",
            "repetition": "PeriodicSuffix",
            "rollout": {"samples_per_prompt": 1, "max_new_tokens": 6},
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": {"path": train_path}, "batch_size": 4}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The package installed into a folder, with the metadata that an installer writes from its pyproject.toml.

    By hand, because an installer would need its build tools at hand or a network.
    """
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    about = project["project"]
    for package in project["tool"]["setuptools"]["packages"]:
        shutil.copytree(PACKAGE / package, folder / package)
    info = folder / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    lines = []
    for group, entries in about["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


def run(folder, path, *command):
    paths = [str(path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


def trained(folder, version):
    with (folder / f"runs/opd/version_{version}/metrics.csv").open() as file:
        return next(row for row in csv.DictReader(file) if row["train/loss"])


BY_ENTRY_POINT = """
import sys
from stable_opd.cli import main

main(["list", "divergence"])
main(["fit", "-c", "recipe.yaml", "--model.divergence", "OutsiderKL", "--model.divergence.weight", "0.5"])
# The same class by its full path.
main(["fit", "-c", "recipe.yaml", "--model.divergence", "opd_outsider.OutsiderKL"])
"""


@pytest.mark.slow
def test_installed_plugin_is_known_by_its_short_name_and_by_its_full_path(recipe, site):
    code, printed, errors = run(recipe, site, "-c", BY_ENTRY_POINT)
    assert code == 0, errors
    (line,) = (line for line in printed.splitlines() if line.startswith("  OutsiderKL "))
    assert line.split(maxsplit=3)[1:] == ["full", "-", "Forward KL over the whole vocabulary, times a weight."]
    short, full = trained(recipe, 0), trained(recipe, 1)
    assert float(short["train/loss"]) == pytest.approx(0.5 * float(full["train/loss"]))
    assert short["train/value/divergence"] == full["train/value/divergence"]
    assert float(full["train/value/divergence"]) > 0.1


BY_FILE = """
import sys
from stable_opd import build, components
from stable_opd.cli import main

assert "OutsiderKL" not in components("divergence")
# By full path, from a module that lies beside the recipe and that nobody has installed or imported.
main(["fit", "-c", "recipe.yaml", "--model.divergence", "opd_outsider.OutsiderKL"])
"""

BY_IMPORT = """
import opd_outsider
from stable_opd import build, components
from stable_opd.cli import main

assert components("divergence")["OutsiderKL"] is opd_outsider.OutsiderKL
assert build("divergence", "OutsiderKL", weight=2.0).weight == 2.0
main(["fit", "-c", "recipe.yaml", "--model.divergence", "OutsiderKL"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [BY_FILE, BY_IMPORT], ids=["full path", "import"])
def test_module_beside_the_recipe_is_found_without_being_installed(script, recipe):
    shutil.copytree(PACKAGE / "opd_outsider", recipe / "opd_outsider")
    code, _, errors = run(recipe, "", "-c", script)
    assert code == 0, errors
    assert float(trained(recipe, 0)["train/value/divergence"]) > 0.1


@pytest.mark.slow
def test_packages_own_tests_pass(site, tmp_path):
    """Elsewhere, so that nothing of this repository's configuration is found."""
    shutil.copytree(PACKAGE / "tests", tmp_path / "tests")
    code, printed, errors = run(tmp_path, site, "-m", "pytest", "-q", "tests")
    assert code == 0, printed + errors
    assert "1 passed" in printed


def test_documentation_quotes_the_whole_package():
    quoted = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    files = [path for pattern in ("**/*.py", "*.toml") for path in PACKAGE.glob(pattern) if path.name != "conftest.py"]
    assert quoted == {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_components_and_checks_that_the_documentation_names_exist():
    known = {name for kind in kinds() for name in components(kind)} | {"OutsiderKL"}
    named = set(re.findall(r"`([A-Z]\w*[a-z]\w*)`", PAGE))
    assert len(named) > 10
    assert named <= known
    assert {name for names in re.findall(r"skip=\[(.*?)\]", PAGE) for name in re.findall(r'"(.*?)"', names)} <= {
        name for names in CHECKS.values() for name in names
    }

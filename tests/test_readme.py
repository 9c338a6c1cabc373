"""What the README says is so."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from stable_opd import Evidence, Scores
from stable_opd.cli import main
from stable_opd.commands import BEGIN, CHOICES, END

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_of_components_are_current():
    """In a process of its own, because other tests import what the library does not announce."""
    command = [sys.executable, "-m", "stable_opd", "list", "--markdown"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    printed = README.partition(BEGIN)[2].partition(END)[0]
    assert printed.strip() == done.stdout.strip(), "Run `stable-opd list --markdown README.md`."


@pytest.mark.parametrize("kind", CHOICES)
def test_tables_have_every_kind_to_choose_from(kind):
    assert f"**{kind}**\n\n| name | " in README


def test_local_links_and_pictures_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_recipes_differ_in_mixture_and_constraints_only():
    stable, collapse = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("quickstart", "collapse")
    )
    assert stable["model"].pop("mixture") != collapse["model"].pop("mixture")
    assert stable["model"].pop("constraints")
    assert "constraints" not in collapse["model"]
    for recipe in (stable, collapse):
        recipe["trainer"]["logger"]["init_args"].pop("name")  # the run folders
    assert stable == collapse


def block(language, number=0):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[number]


def test_recipe_is_understood(tmp_path, capsys):
    path = tmp_path / "my_recipe.yaml"
    path.write_text(block("yaml"))
    with pytest.raises(SystemExit) as done:
        main(["fit", "-c", str(path), "--print_config"])
    assert done.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved["model"]["mixture"]["init_args"]["schedule"]["init_args"] == {"start": 1.0, "end": 0.1}
    columns = {"prompt": "problem", "golden": "solution", "answer": "answer", "judged": None}
    assert resolved["data"]["init_args"]["columns"] == columns


@pytest.mark.parametrize("number", [1, 2])
def test_additions_to_the_recipe_are_understood(number, tmp_path, capsys):
    paths = []
    for place in (0, number):
        paths += ["-c", str(tmp_path / f"{place}.yaml")]
        Path(paths[-1]).write_text(block("yaml", place))
    with pytest.raises(SystemExit) as done:
        main(["fit", *paths, "--print_config"])
    assert done.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    if number == 1:
        assert (resolved["model"]["adapter"]["rank"], resolved["model"]["adapter"]["quantization"]) == (16, "nf4")
        assert resolved["model"]["teacher"]["init_args"]["quantization"] == "nf4"
    else:
        assert resolved["data"]["init_args"]["validation"]["aime24"]["samples"] == 32
        assert resolved["data"]["init_args"]["task"]["class_path"].endswith("MathVerify")


@pytest.mark.slow
def test_parts_that_compose_train_together(tmp_path):
    path = tmp_path / "parts.yaml"
    path.write_text(block("yaml", 3))
    short = ["--trainer.max_steps", "2", "--trainer.num_sanity_val_steps", "0", "--data.batch_size", "4"]
    out = ["--trainer.logger.save_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"]
    main(["fit", "-c", str(ROOT / "configs" / "quickstart.yaml"), "-c", str(path), *short, *out])
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1"]
    assert all(math.isfinite(float(row[f"train/loss/{term}"])) for row in rows for term in ("divergence", "anchor"))
    resolved = yaml.safe_load(next(tmp_path.rglob("config.yaml")).read_text())["model"]
    assert resolved["divergence"]["init_args"]["baseline"]["class_path"].endswith("ExactBaseline")
    assert resolved["reference"]["class_path"].endswith("MovingAverage")


def test_component_of_ones_own_is_the_divergence_it_claims_to_be():
    namespace = {}
    exec(block("python"), namespace)  # the README is ours
    divergence = namespace["Hellinger"]()
    p, q = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.5]])
    facts = Evidence(
        tokens=torch.zeros(1, dtype=torch.long),
        row=torch.zeros(1, dtype=torch.long),
        position=torch.zeros(1, dtype=torch.long),
        in_loop=torch.zeros(1, dtype=torch.bool),
        author=torch.zeros(1, dtype=torch.long),
        behaviour_logprobs=torch.zeros(1),
        progress=0.0,
        student=Scores(p[:, 0].log(), p.log()),
        teacher=Scores(q[:, 0].log(), q.log()),
    )
    expected = (p.sqrt() - q.sqrt()).square().sum(-1) / 2
    torch.testing.assert_close(divergence(facts).loss, expected)

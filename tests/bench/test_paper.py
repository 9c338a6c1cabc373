"""The specs of the paper's experiments expand, without a model or a data set at hand."""

from pathlib import Path

import pytest
import yaml

from stable_opd.bench.expand import expand
from stable_opd.bench.spec import MATH, read

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"
RUNS = {"main": 6, "ablation": 4, "warm_start": 2}


def test_every_spec_is_known_here():
    assert sorted(each.stem for each in FOLDER.glob("*.yaml")) == sorted(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_spec_expands_to_the_setup_of_the_paper(name, tmp_path):
    spec = read(FOLDER / f"{name}.yaml")
    runs = expand(spec, tmp_path)
    assert len(runs) == RUNS[name]
    assert spec.table == "math"
    assert {each.lower() for each in MATH} <= set(spec.metrics)
    for run in runs:
        model, data = run.config["model"], run.config["data"]["init_args"]
        sets = data["validation"]
        assert {each: sets[each]["samples"] for each in sets} == dict.fromkeys(("amc", "aime24", "aime25"), 32) | (
            dict.fromkeys(("math500", "minerva", "olympiad"), 1)
        )
        assert model["rollout"]["eval_temperature"] == 0.6
        assert data["max_golden_tokens"] == 8192
        assert data["columns"]["judged"] == "correctness_math_verify"
        assert data["batch_size"] * run.config["trainer"]["devices"] == 64
        size = "7b" if "7b" in run.combination else "1.5b"
        assert model["student"].startswith(f"models/qwen2.5-math-{size}")
        if name != "warm_start":
            assert model["rollout"]["samples_per_prompt"] == 4
            assert model["optimizer"]["class_path"] == "torch.optim.Adam"
            assert model["optimizer"]["init_args"]["lr"] == 1e-6


def test_metrics_are_those_that_an_evaluation_logs():
    """Their columns are made of the names of the sets, which are the recipe's."""
    recipe = yaml.safe_load((FOLDER.parents[1] / "configs" / "math" / "stable_opd.yaml").read_text())
    names = recipe["data"]["init_args"]["validation"]
    for name in RUNS:
        for metric, figure in read(FOLDER / f"{name}.yaml").metrics.items():
            if metric in names:
                assert figure.column == f"val/{metric}/sampled/accuracy"

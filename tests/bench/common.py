"""What the tests of the benchmark runner share."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from stable_opd.bench.spec import read


def write_spec(folder, name="spec.yaml", **keys):
    """Write a spec beside an empty recipe, and return its path."""
    (folder / "recipe.yaml").touch()
    path = folder / name
    path.write_text(
        yaml.safe_dump({"config": "recipe.yaml", "axes": {"a": {"x": {}, "y": {}}}} | keys, sort_keys=False)
    )
    return path


def spec_of(folder, **keys):
    return read(write_spec(folder, **keys))


def start(*args, cwd):
    """Start `stable-opd bench`, as a shell would."""
    command = [sys.executable, "-m", "stable_opd", "bench", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def bench(*args, cwd):
    """Run `stable-opd bench`; return exit status, stdout and stderr."""
    process = start(*args, cwd=cwd)
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def write_recipe(folder, student, teacher, train, validation, **trainer):
    """Write a recipe of two steps on tiny random models."""
    recipe = {
        "model": {
            "student": student,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher}},
            "divergence": {"class_path": "SampledReverseKL", "init_args": {"clip": 0.3}},
            "mixture": "StudentOnly",
            "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
            "rollout": {"max_new_tokens": 10},
        },
        "data": {
            "class_path": "PromptDataModule",
            "init_args": {
                "train": {"path": train},
                "validation": {"path": validation},
                "task": "ModularChains",
                "batch_size": 8,
            },
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "check_val_every_n_epoch": None,
            "val_check_interval": 1,
            "enable_progress_bar": False,
        }
        | trainer,
    }
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path

"""Every recipe that is shipped runs: what is not executed here rots."""

from pathlib import Path

import pytest
import torch

from stable_opd.cli import main
from stable_opd.resume import step_of

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
#: As little work as shows that the parts fit together.
SMALL = {
    "--trainer.max_steps": "2",
    "--trainer.val_check_interval": "1",
    "--trainer.limit_val_batches": "1",
    "--trainer.num_sanity_val_steps": "0",
    "--trainer.enable_progress_bar": "false",
    "--trainer.accelerator": "cpu",
    "--trainer.devices": "1",
    "--model.rollout.samples_per_prompt": "1",
    "--model.rollout.max_new_tokens": "8",
    "--data.batch_size": "2",
    "--data.eval_batch_size": "2",
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_recipe_runs_for_two_steps(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", "-c", str(config), *(part for option in SMALL.items() for part in option)])
    newest = max(tmp_path.rglob("*.ckpt"), key=step_of)
    assert torch.load(newest, weights_only=True)["global_step"] == 2
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "train/loss" in metrics.read_text().splitlines()[0]

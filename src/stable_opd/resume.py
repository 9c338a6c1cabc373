"""Where a run goes on: its checkpoints, whether they are whole, and whether they are of this configuration."""

import contextlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from stable_opd import shards
from stable_opd.models import is_finite

Config = Mapping[str, Any]

#: Options of the trainer that have a say in what is learnt.
_TRAINER = (
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "plugins", "limit_train_batches"),
    *("overfit_batches", "deterministic"),
)

#: What may differ between two attempts at one run: where to go on, how long, what is evaluated, and where files and
#: servers are.
_HARMLESS = re.compile(
    r"config|ckpt_path|weights_only|checkpoint|verbose|return_predictions|model\.rollout\.eval_temperature"
    r"|model\.update\.max_skipped"
    r"|model\.(engine|teacher)\..*\bserver\.(init_args\.)?(url|timeout|retries|parallel|api_key_variable)"
    r"|model\.engine\.init_args\.weights"
    r"|data\.init_args\.(validation|task|eval_batch_size|num_workers)"
    rf"|trainer\.(?!({'|'.join(_TRAINER)})\b)\w+"
)

_NAME = re.compile(r"last-step=(\d+)\.ckpt")


class Place(NamedTuple):
    """Where a run goes on.

    Attributes:
        folder: Its folder.
        checkpoint: Its newest whole checkpoint; None if it left none, so that it begins anew there.
    """

    folder: Path
    checkpoint: Path | None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step in a folder of checkpoints."""
    return folder / f"last-step={step}.ckpt"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint that is named by it; -1 if it is not."""
    named = _NAME.fullmatch(path.name)
    return int(named.group(1)) if named else -1


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first."""
    return sorted((each for each in folder.glob("*.ckpt") if step_of(each) >= 0), key=step_of, reverse=True)


def check_whole(path: Path) -> None:
    """Make sure that a checkpoint is as it was written, and that it holds plain values.

    Every part of a file has a checksum, which `torch.load` does not look at; so have the files of one in shards.

    Raises:
        ValueError: If it is not.
    """
    if not path.exists():
        raise ValueError(
            f"Expected a checkpoint on this machine, but there is no {path}. Copy it here, or take --ckpt_path last."
        )
    try:
        with zipfile.ZipFile(_plain(path)) as archive:
            packed = next((each.filename for each in archive.infolist() if each.compress_type), None)
            broken = packed or archive.testzip()  # no checkpoint is compressed; unpacked, it could be of any size
        flaw = (
            _flaw(path, peek(path))
            if broken is None
            else f"the part {broken.partition('/')[2]} is not what was written"
        )
        if flaw is None:
            return
    except Exception as error:  # a file can be wrong in any way
        flaw = str(error).partition("\n")[0][:200] or type(error).__name__
    raise ValueError(f"Expected a whole checkpoint of plain values, but got {path}: {flaw}. Go on from an earlier one.")


def _flaw(path: Path, saved: Any) -> str | None:
    """Return what is wrong with a checkpoint that holds some values, or None."""
    state = saved.get("state_dict") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        return "it is no checkpoint of Lightning"
    for name, value in state.items():
        if name.startswith("student.") and isinstance(value, torch.Tensor) and not is_finite(value):
            return f"{name} is not finite"
    return next(shards.flaws(path, saved), None) if path.is_dir() else None


def peek(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, without reading its tensors and without unpickling objects."""
    found: dict[str, Any] = torch.load(_plain(path), map_location="cpu", mmap=True, weights_only=True)
    return found


def _plain(path: Path) -> Path:
    """Return the file of a checkpoint that holds plain values; one in shards is a folder."""
    return path / shards.PLAIN if path.is_dir() else path


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is whole; what is damaged is named and left out."""
    for each in checkpoints(folder):
        try:
            check_whole(each)
        except ValueError as error:
            rank_zero_warn(str(error))
        else:
            return each
    return None


def changes(before: Config, after: Config) -> list[str]:
    """Return what differs between two configurations and has a say in what is learnt, a phrase for each."""
    from stable_opd.bench.recipes import differences

    found = [each for each in differences(before, after) if not _HARMLESS.match(each.partition(":")[0])]
    return found + differences(_guard(before), _guard(after), "trainer.callbacks")


def _guard(config: Config) -> Config:
    """Return the settings of a guard that acts, the only callback of ours that has a say in what is learnt."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        settings = each.get("init_args") or {}
        if each.get("class_path", "").rpartition(".")[2] == "CollapseGuard" and settings.get("mode") == "act":
            return {"CollapseGuard": settings}
    return {}


def refusal(different: list[str], what: str) -> str:
    """Return why a run does not go on with another configuration."""
    return (
        f"Expected the configuration with which {what} was trained, but got {len(different)} changes: "
        f"{'; '.join(different)}. Set them back, begin anew without --ckpt_path, or go on all the same with "
        "--checkpoint.accept_changes true."
    )


def last(config: Config, trains: bool = True) -> Place | None:
    """Find the run that a command continues or evaluates: the newest of its configuration, where its logger writes.

    Args:
        config: The resolved configuration of the command.
        trains: Whether it trains, so that a run without a checkpoint may begin anew.

    Returns:
        Where it goes on; None if there is no run yet.

    Raises:
        ValueError: If there are runs, but all of another configuration, or if there is nothing to evaluate.
    """
    accepted = (config.get("checkpoint") or {}).get("accept_changes", False)
    refused = None
    for folder in _folders(config):
        record = _record(folder)
        if record is None or "verbose" in record or "return_predictions" in record:  # these two are of evaluations
            continue
        different = changes(record, config)
        if different and not accepted:
            if checkpoints(folder / "checkpoints"):
                refused = refused or refusal(different, f"the run in {folder}")
            continue
        checkpoint = newest(folder / "checkpoints")
        if checkpoint is None and (different or not trains):
            continue
        where = f"step {step_of(checkpoint)}" if checkpoint else "the beginning, as it left no checkpoint"
        rank_zero_info(f"The run in {folder} goes on from {where}.")
        return Place(folder, checkpoint)
    if refused:
        raise ValueError(refused)
    if not trains:
        raise ValueError(
            "Expected a run of this configuration with a checkpoint, because of --ckpt_path last, but got none where "
            "the logger writes. Train it first, or name a checkpoint by its path."
        )
    return None


def logger_settings(config: Config) -> Config:
    """Return the settings of the first logger."""
    logger = config["trainer"].get("logger")
    logger = logger[0] if isinstance(logger, list) and logger else logger
    return (logger.get("init_args") or {}) if isinstance(logger, Mapping) else {}


def _folders(config: Config) -> Iterator[Path]:
    """Yield the folders in which a run of this configuration may be, the newest first."""
    settings = logger_settings(config)
    if "version" not in settings:  # one that names its runs by itself, or none
        yield Path(config["trainer"].get("default_root_dir") or ".")
        return
    root, version = Path(settings["save_dir"]) / (settings.get("name") or ""), settings["version"]
    if version is not None:
        yield root / (version if isinstance(version, str) else f"version_{version}")
        return
    numbers = [each.name.removeprefix("version_") for each in root.glob("version_*")]
    for number in sorted((int(each) for each in numbers if each.isdigit()), reverse=True):
        yield root / f"version_{number}"


def _record(folder: Path) -> Config | None:
    """Return the configuration of a run: that of a checkpoint, or of its folder if it left none."""
    from stable_opd.bench.yamls import SpecError, load_file

    for each in checkpoints(folder / "checkpoints"):
        with contextlib.suppress(Exception):  # a file can be wrong in any way; whoever wants to go on there is told
            saved: Config | None = (peek(each).get("callbacks", {}).get("RunCheckpoint") or {}).get("config")
            if isinstance(saved, dict):
                return saved
    path = folder / "config.yaml"
    with contextlib.suppress(SpecError):  # killed while it was written
        found = load_file(path, "a config") if path.is_file() else None
        return found if isinstance(found, dict) else None
    return None

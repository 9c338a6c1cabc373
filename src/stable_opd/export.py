"""`stable-opd export`: from a checkpoint of a run to a folder that transformers and vLLM load."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_opd import shards
from stable_opd.bench.yamls import load_file
from stable_opd.models import load_model, load_tokenizer
from stable_opd.resume import check_whole, peek
from stable_opd.students import LoRA, check_adapter, describe_adapter

DTYPES = ("float32", "bfloat16", "float16")


def export(args: Sequence[str]) -> None:
    """Turn a checkpoint into a folder that transformers and vLLM load."""
    parser = argparse.ArgumentParser("stable-opd export", description=inspect.getdoc(export))
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a run, the .ckpt file or folder")
    parser.add_argument("folder", type=Path, help="where to write to; made if there is none, and has to be empty")
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters alone, for peft, and do not merge them"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision to write in; default: that of the initial student")
    parser.add_argument("--config", type=Path, help="config.yaml of the run; default: the one above the checkpoint")
    chosen = parser.parse_args(args)
    try:
        dtype = None if chosen.dtype is None else getattr(torch, chosen.dtype)
        write_student(chosen.checkpoint, chosen.folder, chosen.adapter, dtype, chosen.config)
    except ValueError as error:
        parser.error(str(error))
    print(f"Wrote {chosen.folder}")


def write_student(
    checkpoint: Path,
    folder: Path,
    adapter_alone: bool = False,
    dtype: torch.dtype | None = None,
    config: Path | None = None,
) -> None:
    """Write the student of a checkpoint as a folder of transformers, or its adapters as one of peft.

    The adapters of a quantised student are merged into what its weights are after the quantisation, because it learnt
    beside these.

    Args:
        checkpoint: A checkpoint file of Lightning, or the folder of a sharded one.
        folder: Where to write to.
        adapter_alone: Whether to leave the adapters apart from the weights.
        dtype: Precision to write in; none takes that of the initial student, and leaves adapters in float32.
        config: The config.yaml of the run; none looks beside the checkpoint, and above.

    Raises:
        ValueError: If there is no such checkpoint or config, if the folder is not empty, or if there are no adapters to
            leave apart.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"Expected an empty folder to write to, but got {folder}. Choose another one, or delete it.")
    path, adapter = read_recipe(config or _config_of(checkpoint))
    saved = _load(checkpoint)
    state: dict[str, Tensor] = saved["state_dict"]
    student = {name.removeprefix("student."): each for name, each in state.items() if name.startswith("student.")}
    model: Any = load_model(path, quantization=adapter.quantization if adapter else None)
    check_adapter(saved.get("adapter"), None if adapter is None else describe_adapter(model, adapter))
    if adapter is not None:
        model = _adapted(model, adapter, student, adapter_alone)
    elif adapter_alone:
        raise ValueError(f"Expected a run with model.adapter, but {checkpoint} holds all weights. Leave out --adapter.")
    else:
        _fill(model, student, path)
    if dtype is not None:
        model.to(dtype)
    if not adapter_alone:
        _end_as_trained(model, saved.get("stop_ids"))
    model.save_pretrained(folder)
    load_tokenizer(path).save_pretrained(folder)


def _end_as_trained(model: Any, stop_ids: list[int] | None) -> None:
    """Let `generate` end answers with the tokens that ended them in training, which may be those of the teacher too."""
    if stop_ids and model.generation_config is not None:
        model.generation_config.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]


def _adapted(model: Any, adapter: LoRA, weights: dict[str, Tensor], alone: bool) -> Any:
    """Return a model with adapters by peft, or with what they add to its weights."""
    from peft import get_peft_model

    if adapter.quantization is not None and not alone:
        model = model.dequantize(model.dtype)
    wrapped: Any = get_peft_model(model, adapter.config())
    _fill(wrapped.base_model.model, weights, "a student with such adapters", adapters=True)
    return wrapped if alone else wrapped.merge_and_unload()


def _fill(model: Any, weights: dict[str, Tensor], what: str, adapters: bool = False) -> None:
    """Give a model its weights; the base of adapters is not among them.

    Raises:
        ValueError: If they are those of another model.
    """
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
        other = [*unknown, *(name for name in missing if not adapters or ".lora_" in name)]
        why = f"others: {', '.join(other[:3])}"
    except RuntimeError as error:
        other, why = ["shapes"], " ".join(str(error).split())[:300]
    if other:
        raise ValueError(
            f"Expected a checkpoint with the weights of {what}, but got {why}. Name the config.yaml of its run with "
            "--config."
        )


def _load(checkpoint: Path) -> dict[str, Any]:
    if not (checkpoint / shards.PLAIN if checkpoint.is_dir() else checkpoint).exists():
        raise ValueError(
            f"Expected a checkpoint, but there is no whole one at {checkpoint}. Look in the run's checkpoints/."
        )
    check_whole(checkpoint)
    if checkpoint.is_dir():
        return shards.read(checkpoint, lambda size, dtype: torch.empty(size, dtype=dtype), only={"state_dict"})
    return peek(checkpoint)


def _config_of(checkpoint: Path) -> Path:
    """Return the config.yaml of a run: it lies in the run's folder, the checkpoints in one below."""
    for folder in checkpoint.absolute().parents[:2]:
        if (folder / "config.yaml").exists():
            return folder / "config.yaml"
    raise ValueError(
        f"Expected the config.yaml of the run in the folder of {checkpoint} or in the one above, but got none. Name it "
        "with --config."
    )


def read_recipe(config: Path) -> tuple[str, LoRA | None]:
    """Return path and adapters of a run's student.

    Raises:
        ValueError: If a file is no config.yaml of a run.
    """
    found = load_file(config, "the config.yaml of a run")
    model = found.get("model") if isinstance(found, dict) else None
    student, adapter = (model.get("student"), model.get("adapter")) if isinstance(model, dict) else (None, None)
    if not isinstance(student, str) or not isinstance(adapter, dict | None):
        raise ValueError(f"Expected the config.yaml of a run, but got no model.student in {config}. Name another file.")
    try:
        return student, None if adapter is None else LoRA(**adapter)
    except TypeError as error:
        raise ValueError(
            f"Expected the settings of adapters in {config}, but got {error}. Mend model.adapter."
        ) from error

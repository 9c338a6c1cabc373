"""Handing a student's weights to whoever generates outside of this process."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as bars

from stable_opd.engines.decoder import weight_and_bias
from stable_opd.models import trained
from stable_opd.sharding import is_sharded

#: Integers with as many bytes as a weight.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Return a name for the weights of a model: another one as soon as an update changed a bit of them.

    It is made of sums of each parameter's rows and columns, of its bits as integers, so it costs two looks at the
    weights. Each sum counts by its place, or two changes in opposite directions could hide each other.

    Raises:
        ValueError: If this process has but a part of them.
    """
    if is_sharded(model):
        raise ValueError(
            "Expected a student with all its weights in this process, but got one that is sharded. Give the engine a "
            "copy that is whole (`stable_opd.sharding.InferenceCopy`), as OPDModule does."
        )
    sums = [_sum(each.detach()) for each in model.parameters()]
    devices = {each.device for each in sums}
    listed = [number for device in devices for number in torch.stack([s for s in sums if s.device == device]).tolist()]
    return hashlib.blake2b(repr(listed).encode(), digest_size=12).hexdigest()


def _sum(parameter: Tensor) -> Tensor:
    bits = torch.atleast_2d(parameter.contiguous().view(_BITS[parameter.element_size()])).flatten(1)
    sums = torch.cat([bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum()


@torch.no_grad()
def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as a folder that transformers and vLLM load, adapters and quantisation merged into the weights.

    A head that shares its weights with the embeddings is written apart: a server on a CPU keeps it in a form of its
    own, and would not know that it changed.

    Args:
        model: In evaluation mode, so that adapters drop nothing.
        folder: Made if there is none.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):  # without adapters, and without memory
        shell: Any = AutoModelForCausalLM.from_config(config)
    weights = _merged(model)
    alone = {each.data_ptr(): name for name, each in weights.items()}
    weights = {name: each if alone[each.data_ptr()] == name else each.clone() for name, each in weights.items()}
    with _quietly():
        shell.save_pretrained(folder, state_dict=weights)


def _merged(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights that a model computes with, under the names they have in one that was not changed."""
    computed: dict[str, Any] = {}
    for name, each in model.named_modules():
        changed = hasattr(each, "base_layer") or (isinstance(each, nn.Linear) and type(each) is not nn.Linear)
        if changed and not any(name.startswith(f"{owner}.") for owner in computed):
            computed[name] = each
    inside = tuple(f"{owner}." for owner in computed)
    merged = {name: each for name, each in model.state_dict().items() if not name.startswith(inside)}
    for owner, layer in computed.items():
        weight, bias = weight_and_bias(layer, model.dtype)
        merged[f"{owner}.weight"] = weight.contiguous()
        if bias is not None and layer.bias is not None:
            merged[f"{owner}.bias"] = bias
    return merged


@contextmanager
@torch.no_grad()
def rehearsed(model: PreTrainedModel) -> Iterator[None]:
    """Have other weights in a model for the time of a context: all those that learn are changed, by a third or so."""
    learning = trained(model) or list(model.parameters())  # a copy for writing has none that learn
    kept = [each.detach().to("cpu", copy=True) for each in learning]
    generator = torch.Generator()
    try:
        for number, each in enumerate(learning):
            noise = torch.randn(each.shape, generator=generator.manual_seed(number)).to(each)
            each.add_(noise * (0.3 * each.square().mean().sqrt().clamp(min=0.05)))
        yield
    finally:
        for each, before in zip(learning, kept, strict=True):
            each.copy_(before)


@contextmanager
def _quietly() -> Iterator[None]:
    """Show no progress bar for a file that is written in every step."""
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()

"""Checkpoints in a folder to which each process writes its part, and any number of processes reads its own."""

import pickle
import warnings
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

#: The file with all that is in no shard; Lightning knows such a folder by it.
PLAIN = "meta.pt"
#: Its entry that says where the sharded tensors belong, and the one with sizes and checksums of the other files.
PLACES, FILES = "sharded_tensors", "sharded_files"

Keys = tuple[Any, ...]


def write(checkpoint: dict[str, Any], folder: Path, first: bool) -> None:
    """Write a checkpoint; every process has to call it, at a folder that all of them see.

    Args:
        checkpoint: Plain values and tensors; those that are spread over processes are in dictionaries and lists.
        folder: Where to write to; empty or not there.
        first: Whether this is the first process, which writes what is not sharded.

    Raises:
        OSError: If some process cannot write.
    """
    tensors: dict[Keys, DTensor] = {}
    plain = _without(checkpoint, (), tensors)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        save({_name(keys): each.detach() for keys, each in tensors.items()}, checkpoint_id=str(folder))
    except CheckpointException as error:  # no Exception
        raise OSError(str(next(iter(error.failures.values()))[0])) from error
    own = [*folder.glob(f"__{dist.get_rank()}_*"), *(folder.glob(".metadata") if first else [])]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {each.name: _fingerprint(each) for each in own})
    if first:
        files = {name: print_ for part in parts for name, print_ in part.items()}
        torch.save(plain | {PLACES: [list(keys) for keys in tensors], FILES: files}, folder / PLAIN)


def read(
    folder: Path, empty: Callable[[torch.Size, torch.dtype], Tensor], only: Collection[str] = ()
) -> dict[str, Any]:
    """Read a checkpoint; if there are several processes, all of them have to.

    Args:
        folder: What `write` has written, by however many processes.
        empty: Makes memory for a tensor of a shape and a precision; of one that is spread over processes, each reads
            its part.
        only: The entries whose sharded tensors are wanted; none means all.
    """
    checkpoint: dict[str, Any] = torch.load(folder / PLAIN, map_location="cpu", weights_only=True)
    checkpoint.pop(FILES)
    places = [tuple(keys) for keys in checkpoint.pop(PLACES) if not only or keys[0] in only]
    reader = _Reader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for keys in places:
        described = stored[_name(keys)]
        assert isinstance(described, TensorStorageMetadata)
        tensors[_name(keys)] = empty(described.size, described.properties.dtype)
    if tensors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is what is meant
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    for keys in places:
        part: Any = checkpoint
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = tensors[_name(keys)]
    return checkpoint


def flaws(folder: Path, plain: dict[str, Any]) -> Iterator[str]:
    """Yield in which ways the shards are not what was written.

    Args:
        folder: Of the checkpoint.
        plain: What its file `PLAIN` holds.

    Raises:
        UnpicklingError: If what describes them holds something else.
    """
    if FILES not in plain:
        yield "it does not say which parts it has"
        return
    for name, fingerprint in plain[FILES].items():
        if not (folder / name).is_file():
            yield f"its part {name} is missing"
        elif _fingerprint(folder / name) != list(fingerprint):
            yield f"the part {name} is not what was written"
    _Reader(folder).read_metadata()


def gathered(checkpoint: Any, keep: bool) -> Any:
    """Return a checkpoint with whole tensors in the host's memory; every process has to call it.

    Args:
        checkpoint: Nested dictionaries and lists.
        keep: Whether this process needs them.
    """
    if isinstance(checkpoint, DTensor):
        tensor = checkpoint.full_tensor()
        return tensor.cpu() if keep else None
    if isinstance(checkpoint, dict):
        return {key: gathered(value, keep) for key, value in checkpoint.items()}
    return [gathered(value, keep) for value in checkpoint] if isinstance(checkpoint, list) else checkpoint


def _without(value: Any, keys: Keys, found: dict[Keys, DTensor]) -> Any:
    """Return nested dictionaries and lists with None in the place of each sharded tensor, and note these."""
    if isinstance(value, DTensor):
        found[keys] = value
        return None
    if isinstance(value, dict):
        return {key: _without(each, (*keys, key), found) for key, each in value.items()}
    if isinstance(value, list):
        return [_without(each, (*keys, place), found) for place, each in enumerate(value)]
    return value


def _name(keys: Keys) -> str:
    return ".".join(map(str, keys))


def _fingerprint(path: Path) -> list[int]:
    """Return size and checksum of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return [path.stat().st_size, checksum]


#: What a description of tensors consists of.
_DESCRIBING = {
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # its module in Python 3.13
    "torch": {"Size", *(name for name, each in vars(torch).items() if isinstance(each, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "StorageMeta", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
        *("MetadataIndex", "_MEM_FORMAT_ENCODING"),
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever does not describe tensors."""
        if name not in _DESCRIBING.get(module, ()):
            raise pickle.UnpicklingError(f"it holds the object {module}.{name}")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read what describes the tensors, without making any other object."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        return metadata

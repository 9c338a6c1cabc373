"""Passwords and keys do not belong into a configuration, which is kept in files that are read by others."""

import re
from collections.abc import Iterator
from typing import Any

#: Last words of names whose values open something; those of tokens of a vocabulary and of their numbers are others.
_NAME = re.compile(
    r"(^|[_-])(api_?key|(access|secret|private)_?key|secret|password|passwd|authorization|credentials?"
    r"|(access|api|auth|bearer|hf|refresh)_?token)$|^token$",
    re.IGNORECASE,
)
#: A password within an address.
_ADDRESS = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
#: Characters of the shortest key; tokens of a vocabulary are shorter, or stand in angle brackets.
_SHORTEST = 8


def check(config: Any) -> None:
    """Refuse a configuration that holds a secret: config.yaml, checkpoints, logs and reports would hold it too.

    Raises:
        ValueError: If it does; the message names the key and not the value.
    """
    found = ", ".join(_secrets(config))
    if found:
        raise ValueError(
            f"Expected no passwords and keys in the configuration, which is written to files, but got some in {found}. "
            "Put them into the environment, where loggers and hubs look for them, as WANDB_API_KEY and HF_TOKEN."
        )


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of what looks like a secret."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, each in items:
            yield from _secrets(each, f"{name}.{key}".lstrip("."))
    elif isinstance(value, str):
        of_a_vocabulary = len(value) < _SHORTEST or value[0] + value[-1] == "<>"
        if (_NAME.search(name.rpartition(".")[2]) and not of_a_vocabulary) or _ADDRESS.search(value):
            yield name

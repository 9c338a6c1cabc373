"""The component under test, and how to build it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from stable_opd.registry import Component, kinds


@dataclass(frozen=True)
class Subject:
    """A class under test.

    Attributes:
        cls: The class.
        kind: What it is.
        init_args: Values of parameters that have no default, as a YAML would have them.
        require_source: Whether the docstring has to say where the component comes from.
    """

    cls: type[Component]
    kind: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    require_source: bool = True

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the constructor takes."""
        return parameters(self.cls)

    @property
    def nameable(self) -> bool:
        """Whether a YAML can name the class; one that is local to a function has no import path."""
        return "<locals>" not in self.cls.__qualname__

    def build(self) -> Any:
        """Return a new object, as a run would."""
        return self.parsed()[1] if self.init_args and self.nameable else self.cls(**self.init_args)

    def parsed(self) -> tuple[Namespace, Any]:
        """Return what the command line makes of the component's YAML, and the object that follows from it."""
        path = f"{self.cls.__module__}.{self.cls.__qualname__}"
        parser = self.parser()
        config = parser.parse_object({"component": {"class_path": path, "init_args": dict(self.init_args)}})
        return config, parser.instantiate(config)["component"]

    def parser(self) -> ArgumentParser:
        """Return a parser that takes a component of the kind, as the command line does."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_subclass_arguments(kinds()[self.kind], "component", fail_untyped=False, required=True)
        return parser


#: Looks at one side of a component and raises if something is wrong with it.
Check = Callable[[Subject], None]


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return what a constructor takes, by name, without ``*args`` and ``**kwargs``."""
    found = inspect.signature(cls).parameters
    return {name: each for name, each in found.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def expect(condition: bool | torch.Tensor, message: str) -> None:
    """Fail with a message unless something holds.

    Raises:
        AssertionError: If it does not.
    """
    if not condition:
        raise AssertionError(message)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal, tensors by their values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)

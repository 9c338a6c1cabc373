"""Components and their names: the name of a component is the name of its class, and subclassing registers it.

There is no table that could disagree with what the command line accepts; everything is derived from the subclasses that
exist. Third-party components get in through their full path in YAML, through an import, or through an entry point in
the group ``stable_opd.plugins`` whose value names a module to import.
"""

import difflib
import importlib
import inspect
import traceback
import warnings
from abc import ABC
from importlib.metadata import entry_points
from typing import Any, ClassVar

PLUGIN_GROUP = "stable_opd.plugins"

#: Entry points that could not be imported, with the reason; an unknown name may well be one of theirs.
failed_plugins: dict[str, str] = {}


class Component(ABC):
    """Base of everything that is chosen by name; a direct subclass that sets ``kind`` opens a new kind."""

    kind: ClassVar[str]


def kinds() -> dict[str, type[Component]]:
    """Return the base class of every kind, by the kind's name."""
    return {base.kind: base for base in _subclasses(Component) if "kind" in vars(base)}


def components(kind: str) -> dict[str, type[Component]]:
    """Return the concrete components of one kind, by name.

    Raises:
        ValueError: If there is no such kind, or if two classes of it share a name.
    """
    if kind not in kinds():
        raise ValueError(f"Expected a kind of component out of {sorted(kinds())}, but got {kind!r}.")
    found: dict[str, type[Component]] = {}
    for cls in _subclasses(kinds()[kind]):
        if inspect.isabstract(cls) or "<locals>" in cls.__qualname__ or _is_private(cls):
            continue
        if cls.__name__ in found:
            raise ValueError(
                f"Two {kind} components are named {cls.__name__}: {_path(found[cls.__name__])} and {_path(cls)}. "
                "Rename one of them, or do not import both."
            )
        found[cls.__name__] = cls
    return dict(sorted(found.items()))


def build(kind: str, name: str, **init_args: Any) -> Any:
    """Build a component by its name, as the YAML does.

    Raises:
        ValueError: If no component of this kind has that name; the message gives the nearest one.
    """
    known = components(kind)
    if name not in known:
        raise ValueError(unknown_name(kind, name))
    return known[name](**init_args)


def unknown_name(kind: str, name: str) -> str:
    """Say that a name is unknown, what is known, what is near, and which plug-ins could not be loaded."""
    known = list(components(kind))
    near = difflib.get_close_matches(name.rsplit(".", 1)[-1], known, n=1, cutoff=0.5)
    message = f"There is no {kind} named {name!r}."
    if near:
        message += f" Did you mean {near[0]!r}?"
    message += f" Known: {', '.join(known)}. A component of your own is named by its full import path."
    for plugin, reason in failed_plugins.items():
        message += f" Note that the plug-in {plugin!r} could not be loaded: {reason}."
    return message


def load_plugins() -> None:
    """Import the modules that installed packages announce; one that is broken is remembered and warned about."""
    for entry in entry_points(group=PLUGIN_GROUP):
        try:
            importlib.import_module(entry.module)
        except Exception as error:  # any failure of a stranger's module must not take the program down
            failed_plugins[entry.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"The plug-in {entry.name!r} ({entry.value}) could not be loaded:\n{traceback.format_exc()}",
                stacklevel=2,
            )


def summary(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _subclasses(cls: type[Component]) -> list[type[Component]]:
    direct = cls.__subclasses__()
    return list(dict.fromkeys(direct + [deeper for child in direct for deeper in _subclasses(child)]))


def _is_private(cls: type) -> bool:
    return any(part.startswith("_") for part in _path(cls).split("."))


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"

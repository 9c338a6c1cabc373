"""The commands that are not the trainer's: `list` and `testbed`."""

import argparse
import inspect
from collections.abc import Callable, Sequence

from stable_opd import registry


def list_components(args: Sequence[str]) -> None:
    """Print the components that can be named, or the parameters of one of them."""
    parser = argparse.ArgumentParser("stable-opd list", description=inspect.getdoc(list_components))
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(registry.kinds())}; all of them if left out")
    parser.add_argument("name", nargs="?", help="a component of that kind: prints what it is and what it takes")
    chosen = parser.parse_args(args)
    try:
        if chosen.name:
            print(_describe(chosen.kind, chosen.name))
        else:
            print("\n\n".join(_table(kind) for kind in ([chosen.kind] if chosen.kind else registry.kinds())))
    except ValueError as error:
        parser.error(str(error))


def testbed(args: Sequence[str]) -> None:
    """Rebuild the testbed's models and data from their seeds."""
    parser = argparse.ArgumentParser("stable-opd testbed", description=inspect.getdoc(testbed))
    parser.add_argument("--out", required=True, help="folder to write to; the installed files are left alone")
    from stable_opd.testbed.build import build

    build(parser.parse_args(args).out)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"list": list_components, "testbed": testbed}


def _table(kind: str) -> str:
    found = registry.components(kind)
    width = max(map(len, found), default=0)
    return "\n".join([f"{kind}:", *(f"  {name:<{width}}  {registry.summary(cls)}" for name, cls in found.items())])


def _describe(kind: str, name: str) -> str:
    found = registry.components(kind)
    if name not in found:
        raise ValueError(registry.unknown_name(kind, name))
    cls = found[name]
    signature = inspect.signature(cls)
    named = (each for each in signature.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    parameters = ", ".join(map(str, named))
    return f"{cls.__module__}.{name}({parameters})\n\n{inspect.getdoc(cls)}"

"""YAML as the command line reads it, and no key twice."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]


class SpecError(ValueError):
    """What is asked for cannot be done as it is written."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        written: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key_node.tag != "tag:yaml.org,2002:merge" and key in written:
                mark = key_node.start_mark
                raise SpecError(
                    f"Expected each key once, but got {key!r} again in {mark.name}, line {mark.line + 1}. "
                    "Remove or rename one of them."
                )
            written.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


# YAML 1.1 takes 1e-6 for a string because it has no dot; the command line takes it for a number.
_Loader.yaml_implicit_resolvers = {key: list(each) for key, each in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def load(text: str, name: str = "the text") -> Any:
    """Return what a YAML text says.

    Args:
        text: The YAML.
        name: What errors call it.

    Raises:
        SpecError: If it is no YAML, or has a key twice.
    """
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise SpecError(f"Expected YAML in {name}, but got what cannot be read: {error}. Mend it there.") from error
    finally:
        loader.dispose()


def load_file(path: Path, what: str) -> Any:
    """Return what a YAML file says.

    Args:
        path: The file.
        what: What it is, for errors.

    Raises:
        SpecError: If there is no such file, or it cannot be read.
    """
    if not path.is_file():
        raise SpecError(f"Expected {what} in a file, but got {path}, which is none. Check the path.")
    return load(path.read_text(encoding="utf-8"), str(path))


def dump(value: Any) -> str:
    """Return a value as YAML, in the order in which it was written."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))

"""YAML as the command line reads it, and no key twice."""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

#: Values that aliases may stand for, and bytes of a file: no recipe comes near, and what is larger takes minutes.
MOST_VALUES, LARGEST = 100_000, 2**22

#: Characters of a parser's message that are passed on; it may quote the file.
LONGEST_REASON = 500


class SpecError(ValueError):
    """What is asked for cannot be done as it is written."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a key that is written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        written: set[Any] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key_node.tag != "tag:yaml.org,2002:merge" and key in written:
                mark = key_node.start_mark
                raise SpecError(
                    f"Expected each key once, but got {key[:60]!r} again in {self.name}, line {mark.line + 1}. "
                    "Remove or rename one of them."
                )
            written.add(key)
        return super().construct_mapping(node, deep)  # type: ignore[no-any-return]


def _weigh(node: yaml.Node, known: dict[int, int], above: frozenset[int] = frozenset()) -> int:
    """Return how many values a node stands for when every alias is written out."""
    if id(node) in above:
        raise yaml.YAMLError(f"an anchor that contains itself, in line {node.start_mark.line + 1}")
    if id(node) not in known:
        inner = node.value if isinstance(node.value, list) else []
        parts = [part for each in inner for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(_weigh(part, known, above | {id(node)}) for part in parts)
    return known[id(node)]


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
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        if _weigh(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"anchors that stand for more than {MOST_VALUES} values")
        return loader.construct_document(node)
    except SpecError:
        raise
    except Exception as error:  # PyYAML raises errors of many types for tags that do not fit their values
        reason = str(error).replace("<unicode string>", name) or type(error).__name__
        raise SpecError(
            f"Expected YAML in {name}, but got what cannot be read: {reason[:LONGEST_REASON]}. Mend it there."
        ) from error


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
    if path.stat().st_size > LARGEST:
        raise SpecError(f"Expected {what} of at most {LARGEST >> 20} MiB, but got {path}, which is larger. Shorten it.")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise SpecError(
            f"Expected text in UTF-8, but got other bytes in {path}, line {line}. Save it as UTF-8."
        ) from error
    return load(text, str(path))


def dump(value: Any) -> str:
    """Return a value as YAML, in the order in which it was written."""
    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))

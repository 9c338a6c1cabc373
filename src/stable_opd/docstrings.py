"""What a class's docstring says of its parameters and of where it comes from."""

import inspect
import re

_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
_CLAUSE = re.compile(r";|\.(?=\s+[A-Z]|$)")  # the full stop of "et al. 2026" ends nothing


def arguments(cls: type) -> dict[str, str]:
    """Return what the ``Args:`` section says of each parameter, by name."""
    _, _, section = f"\n{inspect.getdoc(cls) or ''}".partition("\nArgs:\n")
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line.strip() and not line.startswith("    "):
            break
        begun = re.match(r" {4}(\w+)(?: \(.*?\))?: *(.*)", line)
        if begun:
            name = begun.group(1)
            found[name] = begun.group(2)
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}"
    return found


def source(cls: type) -> str:
    """Return the paragraph that follows ``Source: ``, on one line; empty if there is none."""
    found = re.search(r"^Source: (.*?)(?:\n\s*\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    return " ".join(found.group(1).split()) if found else ""


def arxiv(cls: type) -> str:
    """Return the first arXiv id of the source's first clause; empty if there is none.

    What stands behind a semicolon or a full stop is about details, or about relatives.
    """
    found = _ARXIV.search(_CLAUSE.split(source(cls), maxsplit=1)[0])
    return found.group(1) if found else ""


def short_source(cls: type) -> str:
    """Return the source up to its first parenthesis, comma, colon or end of a clause; empty if there is none."""
    return re.split(r" \(|[,:]", _CLAUSE.split(source(cls), maxsplit=1)[0], maxsplit=1)[0].strip()


def body(cls: type) -> str:
    """Return the docstring without its ``Args:`` section."""
    return f"\n{inspect.getdoc(cls) or ''}".partition("\nArgs:\n")[0].strip()

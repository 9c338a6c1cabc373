"""What a class's docstring says of its parameters and of where it comes from."""

import inspect
import re

import docstring_parser

_ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")
_CLAUSE = re.compile(r";|\.(?=\s+[A-Z]|$)")  # the full stop of "et al. 2026" ends nothing


def arguments(cls: type) -> dict[str, str]:
    """Return what the ``Args:`` section says of each parameter, by name."""
    parsed = docstring_parser.parse(inspect.getdoc(cls) or "", docstring_parser.DocstringStyle.GOOGLE)
    return {each.arg_name: " ".join((each.description or "").split()) for each in parsed.params}


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

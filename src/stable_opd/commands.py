"""The commands that are not the trainer's: `list`, `calibrate`, `detect`, `testbed`, `bench`, `report` and `export`."""

import argparse
import inspect
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stable_opd import registry
from stable_opd.docstrings import arguments, arxiv, body, short_source
from stable_opd.terms import LossTerm

#: What a user chooses from; the other kinds serve these.
CHOICES = (
    "divergence",
    "transform",
    "baseline",
    "constraint",
    "mixture",
    "sampler",
    "repetition",
    "weighting",
    "schedule",
    "controller",
    "reference",
    "terminal",
)

#: What stands around the table in a file that has it.
BEGIN, END = "<!-- components: begin -->", "<!-- components: end -->"

_SUPPORT = {
    "sampled": "the log-probs of the written tokens",
    "topk": "all log-probs of the student, and the teacher's likeliest tokens",
    "full": "all log-probs of the whole vocabulary",
}
_NEEDS = {
    "needs_teacher": "the teacher's scores",
    "needs_reference": "the reference's scores",
    "needs_golden": "a golden solution for every prompt",
    "needs_writing_teacher": "a teacher that writes, in this process",
    "needs_scores": "one more pass of the student",
}


def list_components(args: Sequence[str]) -> None:
    """Print the components that can be named, or the parameters of one of them."""
    parser = argparse.ArgumentParser("stable-opd list", description=inspect.getdoc(list_components))
    parser.add_argument("kind", nargs="?", help=f"one of {', '.join(registry.kinds())}; all of them if left out")
    parser.add_argument("name", nargs="?", help="a component of that kind: prints what it is and what it takes")
    parser.add_argument(
        "--markdown",
        nargs="?",
        const="",
        metavar="FILE",
        help=f"print the library's own components in Markdown, or write them into a file between {BEGIN} and {END}",
    )
    chosen = parser.parse_args(args)
    try:
        if chosen.markdown is not None:
            print(_markdown()) if not chosen.markdown else _write_markdown(Path(chosen.markdown))
        elif chosen.name:
            print(_describe(chosen.kind, chosen.name))
        else:
            print("\n\n".join(_table(kind) for kind in ([chosen.kind] if chosen.kind else registry.kinds())))
    except ValueError as error:
        parser.error(str(error))


def calibrate(args: Sequence[str]) -> None:
    """Choose window and threshold of the zlib rule by the golden texts of a data set."""
    from stable_opd.repetition import calibration

    calibration.calibrate(args)


def detect(args: Sequence[str]) -> None:
    """Try a repetition detector on labelled loops and on golden texts."""
    from stable_opd.repetition import detect

    detect.detect(args)


def testbed(args: Sequence[str]) -> None:
    """Rebuild the testbed's models and data from their seeds."""
    parser = argparse.ArgumentParser("stable-opd testbed", description=inspect.getdoc(testbed))
    parser.add_argument("--out", required=True, help="folder to write to; the installed files are left alone")
    from stable_opd.testbed.build import build

    build(parser.parse_args(args).out)


def report(args: Sequence[str]) -> None:
    """Say what became of runs, in one page with plots."""
    from stable_opd.report import command

    command.report(args)


def bench(args: Sequence[str]) -> None:
    """Compare combinations of components, as a spec names them."""
    from stable_opd.bench import command

    command.bench(args)


def export(args: Sequence[str]) -> None:
    """Turn a checkpoint into a folder that transformers and vLLM load."""
    from stable_opd import export as command

    command.export(args)


def doctor(args: Sequence[str]) -> None:
    """Say what will go wrong with a run before its first step."""
    from stable_opd.doctor import command

    command.doctor(args)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "list": list_components,
    "calibrate": calibrate,
    "detect": detect,
    "testbed": testbed,
    "report": report,
    "bench": bench,
    "export": export,
    "doctor": doctor,
}


def _table(kind: str) -> str:
    """Return a line per component: name, support, arXiv id, first line; cut at the terminal's width if there is one."""
    found = registry.components(kind)
    width = max(map(len, found), default=0)
    lines = [
        f"  {name:<{width}}  {_support(cls):<7}  {arxiv(cls) or '-':<10}  {registry.summary(cls)}"
        for name, cls in found.items()
    ]
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    cut = [line if columns is None or len(line) <= columns else f"{line[: columns - 3]}..." for line in lines]
    return "\n".join([f"{kind}:", *cut])


def _support(cls: type) -> str:
    return cls.support if issubclass(cls, LossTerm) else "-"


def _describe(kind: str, name: str) -> str:
    found = registry.components(kind)
    if name not in found:
        raise ValueError(registry.unknown_name(kind, name))
    cls = found[name]
    taken = _parameters(cls)
    head = f"{cls.__module__}.{name}({', '.join(f'{each}{rest}' for each, rest in taken.items())})"
    parts = [head, body(cls)]
    if taken:
        documented = arguments(cls)
        lines = ["Parameters:"]
        for each, rest in taken.items():
            lines += [f"  {each}{rest}", textwrap.indent(textwrap.fill(documented.get(each, ""), 112), " " * 6)]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, *_reads(cls)])


def _parameters(cls: type) -> dict[str, str]:
    """Return type and default of each parameter, as they are written in Python, by name."""
    found = {}
    for name, each in inspect.signature(cls).parameters.items():
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            default = "" if each.default is each.empty else f" = {each.default!r}"
            found[name] = f": {_annotation(each.annotation)}{default}"
    return found


def _annotation(annotation: Any) -> str:
    """Return a type without the modules that the library's own classes are in."""
    written = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return " ".join(
        "".join(piece.rpartition(".")[2] if piece.startswith("stable_opd.") else piece for piece in _pieces(word))
        for word in written.split(" ")
    )


def _pieces(word: str) -> list[str]:
    return word.replace("[", "\0[\0").replace("]", "\0]\0").replace(",", "\0,\0").split("\0")


def _reads(cls: type) -> list[str]:
    """Return what a component needs to see, as far as its class declares it."""
    found = []
    if issubclass(cls, LossTerm):
        composed = any(
            re.search(r"\b(Divergence|AdvantageBaseline|Mixture)\b", rest) for rest in _parameters(cls).values()
        )
        more = " Parts that need more raise it." if composed else ""
        found.append(f"Support: {cls.support}, {_SUPPORT[cls.support]}.{more}")
    needs = [text for name, text in _NEEDS.items() if getattr(cls, name, False)]
    if needs:
        found.append(f"Needs: {', '.join(needs)}.")
    return found


def _markdown() -> str:
    """Return a table per kind of the library's own components."""
    parts = []
    for kind in CHOICES:
        classes = {
            name: cls for name, cls in registry.components(kind).items() if cls.__module__.startswith("stable_opd.")
        }
        terms = issubclass(registry.kinds()[kind], LossTerm)
        head = ["name", "support", "what it is", "source"] if terms else ["name", "what it is", "source"]
        rows = [head, ["---"] * len(head)]
        for name, cls in classes.items():
            support = [_support(cls)] if terms else []
            rows.append([f"`{name}`", *support, registry.summary(cls).replace("|", "\\|"), _citation(cls)])
        parts.append("\n".join([f"**{kind}**", "", *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts)


def _citation(cls: type) -> str:
    """Return the source in a few words; an arXiv id as a link."""
    known = arxiv(cls)
    if known:
        return f"[{known}](https://arxiv.org/abs/{known})"
    return short_source(cls).replace("|", "\\|") or "-"


def _write_markdown(path: Path) -> None:
    """Put the tables between the two marks of a file.

    Raises:
        ValueError: If it has no such marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise ValueError(
            f"Expected {path} to have the marks {BEGIN} and {END}, but got none. Write them into it first."
        )
    path.write_text(f"{before}{BEGIN}\n\n{_markdown()}\n\n{END}{after}", encoding="utf-8")

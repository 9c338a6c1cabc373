"""The page: HTML from templates, self-contained, without scripts."""

import base64
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np

from stable_opd.report.answers import answers
from stable_opd.report.panels import MOST_VARIANTS, Heat, Panel, variants
from stable_opd.report.runs import Run, differences
from stable_opd.report.style import STYLE
from stable_opd.report.text import escaped, number, one_line
from stable_opd.report.verdict import COLLAPSED, ENOUGH, LAST, LONGER, MORE, Kind, Verdict
from stable_opd.signals.changes import CLEAR, LASTING, QUIET, SLACK, Array

#: A sign for each class, so that it is told by more than its colour.
SYMBOLS: dict[Kind, str] = {
    "stable": "●",
    "inflating": "▲",
    "collapsed": "■",
    "recovered": "↺",
    "too short to say": "…",
}

#: So many runs are told of one by one before anything else; more are folded away.
FEW = 12

#: Longest value of a configuration that is shown in a table.
LONGEST_VALUE = 160


@dataclass(frozen=True)
class Picture:
    """A plot, drawn.

    Attributes:
        what: The data.
        light: PNG file for a light page.
        dark: PNG file for a dark page.
    """

    what: Panel | Heat
    light: bytes
    dark: bytes


def page(runs: Sequence[Run], verdicts: Sequence[Verdict], pictures: Sequence[Picture]) -> str:
    """Return the page.

    Args:
        runs: The runs, one or many.
        verdicts: What became of each.
        pictures: The plots.
    """
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    sections = {
        "verdict": ("Verdict", _verdicts(runs, verdicts)),
        "figures": ("Key figures", _figures(runs, verdicts)),
        "plots": ("Plots", _plots(runs, pictures)),
        "answers": ("Sample answers", answers(runs)),
        "signals": ("What moved, and when", _signals(runs, verdicts)),
        "guard": ("What the guard did", _events(runs)),
        "config": ("Configuration", _configuration(runs)),
        "rules": ("How this is decided", _rules()),
        "versions": ("Versions", _versions(runs)),
    }
    shown = {key: (title, body) for key, (title, body) in sections.items() if body}
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, (title, _) in shown.items())
    bodies = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{body}</section>'
        for key, (title, body) in shown.items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escaped(one_line(name))}: on-policy distillation</title>
<style>{STYLE}</style>
</head>
<body>
<header><p>On-policy distillation report</p><h1><bdi>{escaped(one_line(name))}</bdi></h1>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{bodies}
</main>
</body>
</html>
"""


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table that can be scrolled sideways; the first cell of each row names it.

    Args:
        caption: What it shows, as HTML.
        head: Names of the columns, as HTML.
        rows: The cells, as HTML.
    """
    top = "".join(f'<th scope="col">{each}</th>' for each in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="wide" role="region" aria-label="Table: {caption}" tabindex="0"><table>'
        f"<caption>{caption}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>\n"
    )


def badge(verdict: Verdict) -> str:
    """Return the class of a run as a coloured word with a sign."""
    return (
        f'<span class="badge {verdict.kind.split()[0]}"><span aria-hidden="true">{SYMBOLS[verdict.kind]}</span> '
        f"{verdict.kind}</span>"
    )


def _verdicts(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    if len(runs) == 1:
        return f'<p class="verdict">{badge(verdicts[0])} {escaped(_capital(verdicts[0].reason))}</p>\n'
    counts = Counter(verdict.kind for verdict in verdicts)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in SYMBOLS if counts[kind])
    items = "".join(
        f"<li>{badge(verdict)} <strong>{_name(run)}</strong>: {escaped(verdict.reason)}</li>"
        for run, verdict in zip(runs, verdicts, strict=True)
    )
    opened = " open" if len(runs) <= FEW else ""
    details = f'<details{opened}><summary>Each run</summary><ul class="verdicts">{items}</ul></details>'
    return f'<p class="verdict">Of {len(runs)} runs: {summary}.</p>\n{details}\n'


def _figures(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    """Return the figures of one run as cards, of several as a table."""
    figures = [_key_figures(run, verdict) for run, verdict in zip(runs, verdicts, strict=True)]
    if len(runs) == 1:
        cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures[0].items())
        return f'<dl class="cards">{cards}</dl>\n'
    rows = [
        [_name(run), badge(verdict), *each.values()] for run, verdict, each in zip(runs, verdicts, figures, strict=True)
    ]
    return table("Key figures of each run", ["run", "class", *figures[0]], rows)


def _key_figures(run: Run, verdict: Verdict) -> dict[str, str]:
    """Return the key figures by what they are called."""
    accuracy = _finite(run.validation["val/accuracy"])
    truncation, repetition, length = (
        _finite(run.train[f"train/{name}"]) for name in ("truncation_rate", "repetition_rate", "length_mean")
    )
    return {
        "training steps": str(len(run.train.steps)),
        "validation accuracy, first to last": _span(accuracy[:1], accuracy[-1:]),
        "best accuracy": number(_or_nan(accuracy, np.max)),
        f"truncation, first {QUIET} to last {LAST} steps": _span(truncation[:QUIET], truncation[-LAST:]),
        f"repetition, first {QUIET} to last {LAST}": _span(repetition[:QUIET], repetition[-LAST:]),
        f"mean length, first {QUIET} to last {LAST}": _span(length[:QUIET], length[-LAST:]),
        "first sign": f"step {verdict.first.change.start}" if verdict.first else "none",
        f"truncation above {COLLAPSED:g}": "never" if verdict.collapsed_at is None else f"step {verdict.collapsed_at}",
    }


def _span(before: Array, after: Array) -> str:
    if not len(before) or not len(after):
        return "-"
    return " to ".join(number(round(_or_nan(each), 3)) for each in (before, after))


def _signals(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    rows = []
    for run, verdict in zip(runs, verdicts, strict=True):
        for sign in verdict.signs:
            name = sign.signal.name.removeprefix("the ")
            note = "" if sign.signal.specific else " *"
            change = sign.change
            cells = [name + note, f"{sign.signal.verb}s", f"step {change.start}", f"step {change.sure}"]
            rows.append([_name(run), *cells, number(change.before), number(change.after)][len(runs) == 1 :])
    if not rows:
        return "<p>No signal left the level of the first steps for good.</p>\n"
    head = ["run", "signal", "direction", "began at", "told from noise at", "level before", "farthest level"]
    note = (
        "<p>* moves in healthy runs too, and is never taken for the first sign. The advantage together with the length "
        "is in standard deviations of the first steps.</p>\n"
    )
    found = table("Signals that changed, in the order in which they began", head[len(runs) == 1 :], rows) + note
    return found if len(runs) <= FEW else f"<details><summary>Each run</summary>{found}</details>\n"


def _events(runs: Sequence[Run]) -> str:
    """Return what the guard did; nothing if it did nothing. Signals that changed are told of already."""
    rows = [
        [_name(run), f"step {event['step']}", *(escaped(event.get(key, "")) for key in ("action", "reason", "done"))]
        for run in runs
        for event in run.events
        if event.get("action") != "notice"
    ]
    return table("Alarms and answers", ["run", "when", "what", "why", "done"], rows) if rows else ""


def _plots(runs: Sequence[Run], pictures: Sequence[Picture]) -> str:
    if not pictures:
        return "<p>Nothing was logged that could be drawn.</p>\n"
    left = len(variants(runs)) - MOST_VARIANTS
    note = f"<p>The first {MOST_VARIANTS} variants are drawn, {left} more are not.</p>\n" if left > 0 else ""
    if any(len(seeds) > 1 for seeds in variants(runs).values()):
        note += "<p>Curves are means over the seeds of a variant; bands reach from the least to the largest.</p>\n"
    return f'{note}<div class="plots">{"".join(map(_figure, pictures))}</div>\n'


def _figure(picture: Picture) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data(picture.dark)}">'
        f'<img src="{_data(picture.light)}" alt="{escaped(picture.what.alt)}" loading="lazy"></picture></figure>\n'
    )


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _configuration(runs: Sequence[Run]) -> str:
    parts = []
    told = [run for run in runs if run.config]
    if len(told) > 1:
        found = differences([run.config for run in told])
        rows = [
            [f"<code>{escaped(key)}</code>", *(f"<code>{_value(value)}</code>" for value in values)]
            for key, values in found.items()
        ]
        parts.append(
            table("Keys that differ between the runs", ["key", *(_name(run) for run in told)], rows)
            if rows
            else "<p>The configurations are the same.</p>\n"
        )
    for run in runs:
        if run.config_text:
            title = "The whole configuration" + (f" of {_name(run)}" if len(runs) > 1 else "")
            parts.append(
                f'<details><summary>{title}</summary><pre tabindex="0">{escaped(run.config_text)}</pre></details>\n'
            )
    return "".join(parts) or "<p>There is no config.yaml beside the metrics.</p>\n"


def _value(value: object) -> str:
    return escaped(one_line("null" if value is None else str(value), LONGEST_VALUE))


def _rules() -> str:
    return f"""<details><summary>Classes, changes and their thresholds</summary>
<p>The class speaks about truncation, repetition and length alone; accuracy is told beside it.</p>
<dl>
<dt>collapsed</dt><dd>The mean truncation of {LASTING} steps got above {COLLAPSED:g}, and the run did not come
back.</dd>
<dt>inflating</dt><dd>In the last {LAST} or {LASTING} steps truncation or repetition is above that of the first
{QUIET} by {MORE:g} or more, or the answers are {LONGER:g} times as long; and by {CLEAR:g} standard deviations of the
first steps.</dd>
<dt>recovered</dt><dd>One of the two held on the way, and neither does at the end.</dd>
<dt>stable</dt><dd>None of these.</dd>
<dt>too short to say</dt><dd>Fewer than {ENOUGH} training steps were logged.</dd>
</dl>
<p>A signal has changed once the mean of {LASTING} steps is away from that of the first {QUIET} by the least effect
that matters for it and by {CLEAR:g} standard deviations of those. It began where the cumulative sum of the departures
(less {SLACK:g} standard deviations each) left zero for the last time.</p></details>
"""


def _versions(runs: Sequence[Run]) -> str:
    written = {
        line.lstrip("# ").strip()
        for run in runs
        for line in run.config_text.splitlines()[:3]
        if line.startswith("#") and "==" in line
    }
    mine = ", ".join(f"{each} {_version(each)}" for each in ("stable-opd", "matplotlib", "numpy"))
    theirs = f"<p>The runs were configured by {escaped(', '.join(sorted(written)))}.</p>\n" if written else ""
    folders = "".join(f"<li><code>{escaped(run.folder)}</code></li>" for run in runs)
    return f"{theirs}<p>This page was made by {mine} from:</p><ul>{folders}</ul>\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _name(run: Run) -> str:
    return f"<bdi>{escaped(one_line(run.name, 80))}</bdi>"


def _finite(values: Array) -> Array:
    return values[np.isfinite(values)]


def _or_nan(values: Array, figure: Callable[[Array], float] = np.mean) -> float:
    """Return a figure of some values; nan if there are none."""
    return float(figure(values)) if len(values) else np.nan

"""Sample answers on the page, with the part that repeats itself marked."""

from collections.abc import Mapping, Sequence
from typing import Any

from stable_opd.report.runs import Run
from stable_opd.report.text import escaped, number, one_line

#: Evaluations of a run that are shown, spread over its course, and answers of each.
MOST_EVALUATIONS, MOST_ANSWERS = 6, 8


#: Grades from here on are no grades.
MOST = 1e9

#: Runs whose last answers are not folded away.
FEW = 3


def answers(runs: Sequence[Run]) -> str:
    """Return the sample answers of all runs as HTML; a note if none were kept."""
    parts = []
    for run in runs:
        steps = evaluations(run.samples)
        if steps:
            opened = steps[-1:] if len(runs) <= FEW else []
            name = f"<h3><bdi>{escaped(one_line(run.name, 80))}</bdi></h3>\n" if len(runs) > 1 else ""
            parts.append(name + "".join(_evaluation(run.samples, step, step in opened) for step in steps))
    if parts:
        return "".join(parts)
    return (
        "<p>None were kept. The callback <code>stable_opd.callbacks.samples.RolloutSamples</code> keeps a few of each "
        "evaluation.</p>\n"
    )


def evaluations(samples: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the steps whose answers are shown: first, last, and some between that are spread evenly."""
    steps = sorted({sample["step"] for sample in samples})
    if len(steps) <= MOST_EVALUATIONS:
        return steps
    return [steps[round(place * (len(steps) - 1) / (MOST_EVALUATIONS - 1))] for place in range(MOST_EVALUATIONS)]


def _evaluation(samples: Sequence[Mapping[str, Any]], step: int, shown: bool) -> str:
    """Return the answers of one evaluation, folded away unless it is to be shown."""
    mine = [sample for sample in samples if sample["step"] == step]
    cut, looping = (sum(bool(sample.get(key)) for sample in mine) for key in ("truncated", "repetitive"))
    title = f"After {step} steps" if step else "The initial student"
    count = f"{len(mine)} answers, {cut} truncated, {looping} repetitive"
    items = "".join(f"<li>{_answer(sample)}</li>" for sample in mine[:MOST_ANSWERS])
    return (
        f"<details{' open' if shown else ''}><summary>{title} <small>({count})</small></summary>"
        f'<ol class="answers">{items}</ol></details>\n'
    )


def _answer(sample: Mapping[str, Any]) -> str:
    tags = [text for key, text in (("truncated", "truncated"), ("repetitive", "repetitive")) if sample.get(key)]
    grade = sample.get("grade")
    if isinstance(grade, int | float) and abs(grade) < MOST:
        tags.insert(0, {1.0: "right", 0.0: "wrong"}.get(float(grade), f"grade {number(float(grade))}"))
    shown = "".join(f'<span class="tag {tag.split()[0]}">{tag}</span>' for tag in tags)
    return (
        f'<p class="tags">Problem {escaped(sample.get("index", "-"))} {shown}</p>'
        f'<p class="label">Prompt</p><pre tabindex="0" dir="auto">{escaped(sample.get("prompt", ""))}</pre>'
        f'<p class="label">Answer</p><pre tabindex="0" dir="auto">{marked(sample)}</pre>'
    )


def marked(sample: Mapping[str, Any]) -> str:
    """Return an answer as HTML, with what follows its first repeated token marked."""
    text, start = sample.get("completion", ""), sample.get("repeated_from")
    if not isinstance(text, str):
        return escaped(text)
    if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < len(text):
        return escaped(text)
    return f'{escaped(text[:start])}<span class="turn">⟲ repeats</span><mark>{escaped(text[start:])}</mark>'

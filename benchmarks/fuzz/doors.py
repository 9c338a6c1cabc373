"""The doors through which input from elsewhere comes in, each a function of the bytes that somebody may send.

A door lets its input in, or refuses it in words of this library. Everything else that happens there is a finding:
another exception than ours, a hang, memory without bound, the end of the process.
"""

import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import stable_opd
from stable_opd.bench.figures import figure
from stable_opd.bench.folder import check_ownership, is_finished, metric_rows, plan, read_record
from stable_opd.bench.recipes import resolve
from stable_opd.bench.results import collect
from stable_opd.bench.spec import METRICS, read
from stable_opd.bench.yamls import load, load_file
from stable_opd.callbacks.samples import SAMPLES
from stable_opd.examples import Reader
from stable_opd.export import read_recipe
from stable_opd.guard.callback import EVENTS
from stable_opd.hints import hints
from stable_opd.jsonl import write_records
from stable_opd.report.page import page
from stable_opd.report.panels import heats, panels
from stable_opd.report.runs import read_run
from stable_opd.report.verdict import judge
from stable_opd.resume import check_whole
from stable_opd.sources import Columns, Source
from stable_opd.tasks import ExactMatch, MathVerify, ModularChains
from stable_opd.tasks.math import final_answer
from stable_opd.testbed.build import make_tokenizer

PACKAGE = str(Path(stable_opd.__file__).parent)
FOLDER = Path(tempfile.mkdtemp(prefix="stable-opd-fuzz-"))

#: What every refusal says: what was expected, or what is needed.
_WORDS = re.compile(r"\b(Expected|expected|Could not|needs)\b")

#: Longest message that is no blow-up of its own.
_LONGEST = 4000

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


class Finding(Exception):
    """What went wrong at a door, with a name under which the same fault is known again."""

    def __init__(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        mine = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*mine[-1:], frames[-1])]
        self.name = f"{type(error).__name__} at {places[0]}"
        super().__init__(f"{self.name}, raised at {places[-1]}: {str(error)[:200]}")


def enter(name: str, data: bytes) -> bool:
    """Send bytes through a door, and return whether it let them in.

    Raises:
        Finding: If it neither did that nor refused them in words of this library.
    """
    try:
        DOORS[name](data)
    except Exception as error:
        if is_refusal(error):
            return False
        raise Finding(error) from error
    return True


def is_refusal(error: BaseException) -> bool:
    """Whether an error is one of this library's own: raised by it, with what was expected, and of a decent length."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    said = str(error)
    return (
        isinstance(error, ValueError)
        and raised_in.startswith(PACKAGE)
        and _WORDS.search(said) is not None
        and len(said) < _LONGEST
    )


def _reader(template: str | None, trains: bool) -> Reader:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    limits = {} if trains else {"max_prompt_tokens": 64, "max_golden_tokens": 64}
    return Reader(
        tokenizer, Columns(judged="judged" if trains else None), template is not None, trains=trains, **limits
    )


def _file(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def examples(data: bytes) -> None:
    """A JSONL file of examples, for training and for an evaluation in a chat template."""
    source, refused = Source(str(_file("examples.jsonl", data))), None
    for reader in READERS:
        try:
            for example in reader.read("fuzz", source):
                for task in (ExactMatch(), ModularChains()):
                    task.grade("# 1", example.fields)
        except ValueError as error:
            if not is_refusal(error):
                raise
            refused = error
    if refused is not None:
        raise refused


def yaml(data: bytes) -> None:
    """A text of YAML, as a flag or a file has it."""
    load(_text(data), "the fuzzed text")


def spec(data: bytes) -> None:
    """The spec of a benchmark."""
    _file("recipe.yaml", b"{}")
    read(_file("spec.yaml", data))


def recipe(data: bytes) -> None:
    """A recipe of `stable-opd fit`."""
    resolve(["fit", "-c", str(_file("fit.yaml", data))])


def said(data: bytes) -> None:
    """What the command line says of something that it does not understand."""
    hints(_text(data), {"model.student", "model.divergence", "trainer.max_steps"})


def answer(data: bytes) -> None:
    """What a model writes, as graders without a process of their own read it."""
    text = _text(data)
    final_answer(text)
    for task in (ExactMatch(), ExactMatch(marker=""), ModularChains()):
        task.grade(text, {"answer": text[:8]})


def mathematics(data: bytes) -> None:
    """What a model writes, and a right answer, as Math-Verify compares them."""
    given, _, right = _text(data).partition("\0")
    MATHEMATICS.grade(f"\\boxed{{{given}}}", {"answer": right or "1"})


def metrics(data: bytes) -> None:
    """The metrics.csv of a run, through the whole report but for the drawing."""
    shutil.rmtree(FOLDER / "run", ignore_errors=True)
    _report(_file("run/metrics.csv", data).parent)


def answers(data: bytes) -> None:
    """Sample answers, events of a guard and the configuration of a run, in its report and when it goes on."""
    folder = _file("run/metrics.csv", HEALTHY).parent
    for name in (SAMPLES, EVENTS, "config.yaml"):
        (folder / name).write_bytes(data)
    _report(folder)
    write_records(folder / SAMPLES, 5, [])


def record(data: bytes) -> None:
    """What a benchmark keeps of a run: its record and its metrics."""
    head, _, tail = data.partition(b"\0")
    shutil.rmtree(FOLDER / "bench", ignore_errors=True)
    folder = _file("bench/run.json", head).parent
    _file("bench/metrics.csv", tail)
    run: Any = SimpleNamespace(
        folder=folder, fingerprint="f", config={"trainer": {"log_every_n_steps": 1}}, variants={}, seed=0, command=""
    )
    run.name = "run"
    check_ownership(run)
    is_finished(run)
    plan(run)
    read_record(folder)
    for metric in METRICS.values():
        figure(metric_rows(folder), metric)
    collect(SimpleNamespace(metrics=METRICS), [run])  # type: ignore[arg-type]


def checkpoint(data: bytes) -> None:
    """A checkpoint that a run is told to go on from."""
    check_whole(_file("last-step=1.ckpt", data))


def exported(data: bytes) -> None:
    """The config.yaml of a run whose student is exported."""
    path = _file("exported.yaml", data)
    load_file(path, "a config")
    read_recipe(path)


def _report(folder: Path) -> None:
    run = read_run(folder, "run")
    verdicts = [judge(run)]
    panels([run], [])
    heats([run])
    page([run], verdicts, [])


DOORS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        *(examples, yaml, spec, recipe, said, answer, mathematics, metrics, answers, record, checkpoint, exported),
    )
}

READERS = [_reader(None, True), _reader(TEMPLATE, False)]
MATHEMATICS = MathVerify(seconds=1.0)
HEALTHY = b"epoch,step,train/loss,train/truncation_rate,val/accuracy\n" + b"".join(
    f"0,{step},0.5,0.0,\n".encode() for step in range(40)
)

"""What fuzzing begins with: small inputs of our own for every door, good ones and bad ones."""

import io
import json
import zipfile
from pathlib import Path

import torch
from benchmarks.fuzz.doors import HEALTHY
from benchmarks.runs import ROOT

EXAMPLE = {"prompt": "Q 3 * 7 ;", "golden": "3 * 7 = 1 ; # 1", "answer": "1", "judged": True}
CHAT = {"prompt": [{"role": "user", "content": "Q 3 * 7 ;"}], "golden": ["# 1", "# 2"], "judged": [False, True]}
SAMPLE = {"step": 3, "index": 0, "prompt": "Q 1 ;", "completion": "# 1", "grade": 1.0, "repeated_from": 1}
RECORD = {"fingerprint": "f", "command": "c", "config": {"a": 1}, "status": "finished", "environment": {}}

HOSTILE_ANSWERS = {
    "tower": "9^{9^{9^{9^9}}}",
    "factorial": "((((9!)!)!)!)!",
    "exponent": "10^{10000000000}",
    "root": "\\sqrt[10^{99}]{2^{10^{99}}}",
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "braces": "{" * 3000 + "1" + "}" * 3000,
    "open": "\\frac{" * 2000,
    "closed": "}" * 2000,
    "digits": "9" * 100_000,
    "fractions": "\\frac{1}{" * 300 + "2" + "}" * 300,
    "sum": "\\sum_{i=1}^{10^{12}} \\frac{1}{i!}",
    "product": "\\prod_{i=1}^{10^9} i",
    "integral": "\\int_0^{\\infty} e^{-x^{x^x}} \\sin(x^x) dx",
    "equations": "x^{99}+x^{98}=" * 200 + "1",
    "matrix": "\\begin{pmatrix}" + "&".join("1" * 400) + "\\end{pmatrix}",
    "interval": "(" + "1," * 5000 + "2)",
    "code": "__import__('os').system('touch /tmp/stable-opd-was-here')",
    "bidi": "\u202e1\u2066\0\x1b[31m",
}


def recipes() -> list[bytes]:
    """The recipes that come with the library."""
    return [path.read_bytes() for path in sorted((ROOT / "configs").rglob("*.yaml"))]


def checkpoint(**values: object) -> bytes:
    """A checkpoint that holds little."""
    file = io.BytesIO()
    torch.save({"state_dict": {"student.w": torch.ones(2, 2)}, "global_step": 1, "callbacks": {}, **values}, file)
    return file.getvalue()


def lines(*objects: object) -> bytes:
    """JSONL."""
    return b"".join(json.dumps(each).encode() + b"\n" for each in objects)


def empty_archive() -> bytes:
    """A zip file without anything in it."""
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").close()
    return file.getvalue()


def seeds() -> dict[str, list[bytes]]:
    """Return the inputs of each door."""
    answers = [text.encode("utf-8", "replace") for text in HOSTILE_ANSWERS.values()]
    specs = [path.read_bytes() for path in sorted((ROOT / "benchmarks").glob("*.yaml"))]
    plain = b"axes: {a: {x: {}, y: {model.divergence: ReverseKL}}}\nconfig: recipe.yaml\nseeds: [0, 1]\n"
    odd = b"&a [x, *a]\n", b"a: 1\na: 2\n", b"!!int ''\n", b"!!python/name:os.system\n", b"? [a]\n: b\n", b"<<: 5\n"
    return {
        "examples": [lines(EXAMPLE, EXAMPLE), lines(CHAT), lines(EXAMPLE, None), lines(5), b'{"prompt": "Q', b"[{}]"],
        "yaml": [*recipes(), *odd],
        "spec": [plain, *specs, *odd],
        "recipe": [*recipes(), *odd],
        "said": [b"Option 'modle' is not accepted", b"Expected a dot import path string: KL of a divergence"],
        "answer": [b"so \\boxed{5}.", b"the answer is: $x = 3$.", b"2 + 2 = 4 #### 4", *answers],
        "mathematics": [b"\\frac{1}{2}\x000.5", b"x = 3\x003", *answers],
        "metrics": [HEALTHY, b"step,train/loss\n1,inf\n", b"step\n", b""],
        "answers": [lines(SAMPLE, {**SAMPLE, "step": True, "grade": float("inf")}), b'{"step": 1', b"model: {a: 1}\n"],
        "record": [lines(RECORD) + b"\0" + HEALTHY, lines({"a": 1}) + b"\0step,a\n"],
        "checkpoint": [checkpoint(), checkpoint()[:300], empty_archive(), checkpoint(state_dict=5), b""],
        "exported": [b"model: {student: a, adapter: {rank: 2}}\n", b"model: {student: a}\n", b"model: 5\n", *odd],
    }


def write(folder: Path) -> None:
    """Write the inputs of each door into a folder of its own."""
    for door, inputs in seeds().items():
        (folder / door).mkdir(parents=True, exist_ok=True)
        for number, each in enumerate(inputs):
            (folder / door / f"seed-{number}").write_bytes(each)

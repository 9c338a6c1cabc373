"""Input that means harm, or that an accident has broken: what each kind comes to."""

import json
import re
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from benchmarks.fuzz.seeds import EXAMPLE, HOSTILE_ANSWERS, RECORD
from benchmarks.runs import ROOT
from safetensors.torch import load_file, save_file

from helpers import TOKENIZER, save, tiny_model, write_jsonl
from stable_opd import MathVerify, examples, jsonl
from stable_opd.cli import main
from stable_opd.examples import Reader
from stable_opd.models import load_model
from stable_opd.resume import check_whole, newest
from stable_opd.sources import Columns, Source, read_source
from stable_opd.tasks.math import final_answer

GOOD = json.dumps(EXAMPLE).encode() + b"\n"


def read(data, tmp_path, name="a.jsonl", **options):
    path = tmp_path / name
    path.write_bytes(data)
    return Reader(TOKENIZER, Columns(), trains=True, **options).read("train", Source(str(path)))


ROWS = {
    "truncated": (GOOD * 3 + GOOD[:20], r"Unterminated string .*a\.jsonl, line 4\. Mend"),
    "invalid utf-8": (GOOD + b'{"prompt": "\xff"}\n', r"can't decode byte 0xff .*a\.jsonl, line 2\."),
    "utf-16": (GOOD.decode().encode("utf-16"), r"Expected JSON in UTF-8, but got .*line 1\."),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}\n', r"surrogates not allowed.*line 1\."),
    "null": (GOOD + b"null\n", r"Expected a JSON object, but got null: .*a\.jsonl, line 2\."),
    "number": (b"5\n", r"Expected a JSON object, but got a number: .*line 1\."),
    "list within a list": (b"[[1]]", r"Expected a JSON object, but got a list: .*a\.jsonl, item 1\."),
    "a key twice": (b'{"prompt": "Q", "prompt": "R"}\n', r"the key 'prompt' stands there twice: .*line 1\."),
    "deep": (b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", r"recursion depth exceeded.*line 1\."),
    "a number too long": (b'{"prompt": ' + b"9" * 5000 + b"}\n", r"Exceeds the limit .*line 1\."),
    "two types": (GOOD + b'{"prompt": 5}\n', r"a\.jsonl, row 2: Expected prompts to be text, but got a int"),
    "keys that are data": (b"".join(b'{"k%d": 1}\n' % n for n in range(1001)), r"at most 1000 columns .* got 1001"),
    "prompt of a number": (b'{"prompt": 5}\n', r"a\.jsonl, row 1: Expected prompts to be text, but got a int"),
    "golden of a number": (
        b'{"prompt": "Q", "golden": 5}\n',
        r"row 1: Expected golden solutions to be text, but",
    ),
    "empty prompt": (GOOD + b'{"prompt": ""}\n', r"row 2: Expected every prompt to have some text"),
    "unknown word": (
        b'{"prompt": "\xe2\x80\xae\\u0000\\u001b[31m"}\n',
        r"row 1: .*can encode.*\\u202e\\x00\\x1b",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_broken_rows_are_refused_with_file_and_line(name, tmp_path):
    data, says = ROWS[name]
    with pytest.raises(ValueError, match=f"(?s){says}") as refusal:
        read(data, tmp_path)
    assert len(str(refusal.value)) < 1000


def test_rows_that_bring_the_reader_of_pyarrow_down_are_refused_in_a_folder_too(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"null\n")
    with pytest.raises(ValueError, match=r"got null: .*train\.jsonl, line 1\."):
        read_source(Source(str(tmp_path)))


def test_text_that_looks_like_a_date_stays_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [EXAMPLE | {"answer": "2026-01-01"}])
    assert read_source(Source(str(tmp_path / "a.jsonl")))[0]["answer"] == "2026-01-01"


@pytest.mark.parametrize(
    "values",
    [[3, "x + 1"], [1, 2.5], [True, 1], [2**70, 1], [2**60 + 1, 0.5], [{"level": 1}, {"level": "?"}], [[1, "a"], []]],
    ids=str,
)
def test_columns_may_hold_values_of_several_types_and_keep_them(values, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [EXAMPLE | {"answer": each, "more": each} for each in values])
    found = Reader(TOKENIZER, Columns(), trains=True).read("train", Source(path))
    assert repr([each.fields["answer"] for each in found]) == repr(values)  # 1 is no 1.0: to a grader they differ
    assert repr([each.fields["more"] for each in found]) == repr(values)


def test_rows_without_a_column_have_none_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [EXAMPLE, EXAMPLE | {"more": 1}])
    assert [row["more"] for row in read_source(Source(path))] == [None, 1]


def test_control_and_bidi_characters_are_data_like_any_other(tmp_path):
    text = "\u202e1\u2066\0\x1b[31m\u200b"
    write_jsonl(tmp_path / "a.jsonl", [EXAMPLE | {"answer": text}])
    (found,) = Reader(TOKENIZER, Columns()).read("train", Source(str(tmp_path / "a.jsonl")))
    assert found.fields["answer"] == text


def test_a_gigantic_line_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonl, "LONGEST_LINE", 2**20)
    with pytest.raises(ValueError, match=r"lines of at most 1 MiB, but got a longer one: .*line 2\."):
        read(GOOD + b'{"prompt": "' + b"Q " * 2**20, tmp_path)


@pytest.mark.parametrize("column", ["prompt", "golden"])
def test_gigantic_texts_are_dropped_or_refused_before_they_are_tokenised(column, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "LONGEST", 1000)
    data = GOOD + json.dumps(EXAMPLE | {column: "1 " * 501}).encode()
    with pytest.raises(ValueError, match=rf"row 2: Expected a {column}.* of at most 1000 characters, but"):
        read(data, tmp_path)
    monkeypatch.setattr(Reader, "_tokens", lambda *_, text_only=len, **__: [1])  # whatever the length: nobody asked
    assert len(read(data, tmp_path, max_prompt_tokens=9, max_golden_tokens=9)) == 1


def test_verdicts_that_belong_to_other_solutions_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q 1 ;", "golden": ["# 1", "# 2"], "judged": [True]}])
    with pytest.raises(ValueError, match=r"a verdict on each golden solution, but got 1 on 2"):
        Reader(TOKENIZER, Columns(judged="judged"), trains=True).read("train", Source(path))


@pytest.mark.parametrize("messages", [[{"role": "user"}], [5], [{"role": 1, "content": "Q"}], 5])
def test_prompts_that_are_no_messages_are_refused(messages, tmp_path):
    tokenizer = type(TOKENIZER).from_pretrained(save(tiny_model(1), tmp_path / "student"))
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match="text or a list of chat messages"):
        Reader(tokenizer, Columns(), chat_template=True).encode({"prompt": messages})


@pytest.mark.parametrize("answer", [None, float("nan")])
def test_a_missing_right_answer_is_no_answer(answer):
    with pytest.raises(ValueError, match="to have a right answer to grade by, but got none"):
        MathVerify().grade(r"\boxed{None}", {"answer": answer})


@pytest.fixture(scope="module")
def impatient():
    return MathVerify(seconds=0.5, memory=1024)


@pytest.mark.parametrize("name", ["tower", "factorial", "exponent", "root", "brackets", "open", "digits", "bidi"])
def test_hostile_answers_cost_no_more_than_their_time(name, impatient):
    start = time.monotonic()
    assert impatient.grade(f"\\boxed{{{HOSTILE_ANSWERS[name]}}}", {"answer": "7"}) == 0.0
    assert time.monotonic() - start < 60  # a busy machine, two attempts and a new process included
    assert impatient.grade(r"\boxed{\frac{14}{2}}", {"answer": "7"}) == 1.0


@pytest.mark.parametrize("piece", ["\\boxed{", "}", "{", "answer is ", "####\t\n", "\\", "\\boxed", " ", "answer: \n"])
def test_final_answers_are_found_in_time_that_grows_with_the_text_alone(piece):
    start = time.process_time()
    final_answer(piece * (10**6 // len(piece)))
    assert time.process_time() - start < 5


def refused(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    assert exit.value.code == 2
    return " ".join(capsys.readouterr().err.split())


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
COMPLETE = (ROOT / "configs/quickstart.yaml").read_bytes()
RECIPES = {
    "a key twice": (b"model:\n  student: a\n  student: b\n", "got 'student' again in r.yaml, line 3."),
    "an unknown key": (COMPLETE + b"modle: {}\n", "Option 'modle' is not accepted Did you mean 'model'?"),
    "an unknown key without a value": (COMPLETE + b"modle:\n", "Option 'modle' is not accepted Did you mean"),
    "no mapping": (b"- 1\n", "Expected `name: value` lines in r.yaml, but got [1]."),
    "empty": (b"", "Expected `name: value` lines in r.yaml, but got nothing."),
    "truncated": (b"model: {student: a", "Expected YAML in r.yaml, but got what cannot be read"),
    "invalid utf-8": (b"model: 1\n# \xff\n", "Expected text in UTF-8, but got other bytes in r.yaml, line 2."),
    "a bomb of aliases": (BOMB.encode(), "anchors that stand for more than 100000 values"),
    "an anchor in itself": (b"model: &a [*a]\n", "an anchor that contains itself, in line 1"),
    "deep": (b"[" * 5000, "maximum recursion depth exceeded"),
    "a number too long": (b"seed_everything: " + b"9" * 5000, "Exceeds the limit"),
    "a tag that does not fit": (b"model: !!int ''\n", "Expected YAML in r.yaml"),
    "an object": (b"model: !!python/object/apply:os.mkdir [pwned]\n", "could not determine a constructor"),
    "a file without end": (b"#" * (2**22 + 1), "of at most 4 MiB"),
    "signs that turn round": (
        COMPLETE + "mo\u202edel: {}\n".encode(),
        "Option 'mo⟨U+202E⟩del' is not accepted",
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_broken_recipes_are_refused_with_file_and_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text, says = RECIPES[name]
    Path("r.yaml").write_bytes(text)
    assert says in refused(capsys, "fit", "-c", "r.yaml", "--print_config")
    assert [each.name for each in tmp_path.iterdir()] == ["r.yaml"]


def harmed(folder, harm):
    """Change the weights of a saved model."""
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "q_proj" in name)
    left = {each: value for each, value in harm(weights, name).items() if value is not None}
    save_file(left, path, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda weights, name: weights | {name: weights[name] * torch.nan}, r"but got nan or infinity in \S*q_proj"),
        (
            lambda weights, name: weights | {name: None},
            r"but got none for \S*q_proj",
        ),
        (lambda weights, name: weights | {name: weights[name][:3]}, "transformers cannot read it"),
    ],
    ids=["nan", "missing", "another shape"],
)
def test_models_with_broken_weights_are_refused(harm, says, tmp_path):
    folder = harmed(save(tiny_model(1), tmp_path / "student"), harm)
    with pytest.raises(ValueError, match=says):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{}"], ids=["empty", "huge", "cut"])
def test_a_broken_file_of_weights_is_refused_with_its_folder(content, tmp_path):
    folder = save(tiny_model(1), tmp_path / "student")
    (tmp_path / "student/model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"Expected a causal language model in '{re.escape(folder)}', but"):
        load_model(folder)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Name a folder that was written by save_pretrained, or a hub name"):
        load_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_adapters_of_another_model_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    large = peft.get_peft_model(tiny_model(1, hidden_size=64), peft.LoraConfig(target_modules=["q_proj"]))
    large.peft_config["default"].base_model_name_or_path = save(tiny_model(1), tmp_path / "small")
    large.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Expected a causal language model in .*adapter'"):
        load_model(str(tmp_path / "adapter"))


def checkpoint(folder, step, value=1.0, **others):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"last-step={step}.ckpt"
    torch.save({"state_dict": {"student.w": torch.tensor([value]), "best": torch.tensor(torch.inf)}, **others}, path)
    return path


def test_a_checkpoint_with_nan_in_the_weights_is_named_and_the_one_before_is_taken(tmp_path):
    good, bad = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, float("nan"))
    with pytest.warns(UserWarning, match=r"last-step=2\.ckpt: student\.w is not finite\. Go on from an earlier one"):
        assert newest(tmp_path) == good
    with pytest.raises(ValueError, match=re.escape(str(bad))):
        check_whole(bad)


def test_a_checkpoint_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    import zipfile

    path = tmp_path / "last-step=1.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 2**20)
    with pytest.raises(ValueError, match=r"the part data\.pkl is not what was written"):
        check_whole(path)


@pytest.mark.parametrize("state", [5, None, [1]])
def test_a_file_of_something_else_is_no_checkpoint(state, tmp_path):
    torch.save(state, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="it is no checkpoint of Lightning"):
        check_whole(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "write", [lambda file: torch.save({"global_step": 1}, file), lambda file: file.write_bytes(b"")]
)
def test_of_a_sharded_checkpoint_the_description_is_looked_at(write, tmp_path):
    folder = tmp_path / "last-step=1.ckpt"
    folder.mkdir()
    write(folder / "meta.pt")
    with pytest.raises(ValueError, match="Expected a whole checkpoint"):
        check_whole(folder)


EXPORTS = {
    "other sizes": ({"student": "other"}, {}, "size mismatch"),
    "other names": ({"student": "student"}, {"student.unknown": torch.ones(1)}, "got others: unknown"),
    "nan": ({"student": "student"}, {"student.lm_head.weight": torch.full((20, 32), torch.nan)}, "is not finite"),
    "no config of a run": ({}, {}, "got no model.student"),
    "adapters with odd settings": ({"student": "student", "adapter": {"rang": 1}}, {}, "settings of adapters in"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_checkpoints_that_do_not_fit_are_not_exported(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, more, says = EXPORTS[name]
    save(tiny_model(1), Path("student")), save(tiny_model(1, hidden_size=64), Path("other"))
    state = {f"student.{each}": value for each, value in tiny_model(1).state_dict().items()}
    torch.save({"state_dict": state | more}, "a.ckpt")
    Path("config.yaml").write_text(yaml.safe_dump({"model": model}))
    assert says in refused(capsys, "export", "a.ckpt", "out")
    assert not Path("out").exists()


FOLDERS = {
    "report": (b"step,train/loss\n1," + b"9" * 200_000 + b"\n", "Expected x/metrics.csv to be a table of metrics"),
    "bench": (b'{"fingerprint": 5}', "Expected what a benchmark wrote in"),
    "detect": (b"null\n", "got null: data.jsonl, line 1."),
    "calibrate": (b"\xff\n", "data.jsonl, line 1."),
}


@pytest.mark.parametrize("command", FOLDERS)
def test_commands_refuse_folders_that_are_broken(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, says = FOLDERS[command]
    for name in ("x/metrics.csv", "runs/s/x/seed-0/run.json", "data.jsonl"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Path("s.yaml").write_text("command: detect\naxes: {a: {x: {repetition: NGramLoop}}}\n")
    arguments = {
        "report": ["x"],
        "bench": ["s.yaml", "--collect"],
        "detect": ["--repetition", "NGramLoop", "--data", "data.jsonl"],
        "calibrate": ["data.jsonl"],
    }
    assert says in refused(capsys, command, *arguments[command])


def test_metrics_that_are_no_numbers_are_refused_by_a_benchmark(tmp_path):
    from stable_opd.bench.figures import figure
    from stable_opd.bench.spec import Metric
    from stable_opd.bench.yamls import SpecError

    assert RECORD["status"] == "finished"
    with pytest.raises(SpecError, match=r"Expected numbers in the column 'a' of metrics\.csv, but got 'x' in step 1"):
        figure([{"step": "1", "a": "x"}], Metric("a"))
    assert tmp_path.exists()


def test_parquet_that_is_cut_says_so_in_few_words(tmp_path):
    datasets.Dataset.from_list([EXAMPLE] * 50).to_parquet(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"(?s)Could not read examples from .*cut\.parquet"):
        read_source(Source(str(tmp_path / "cut.parquet")))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e308])
def test_numbers_without_an_end_are_written_and_are_no_grades(value):
    from stable_opd.report.answers import answers
    from stable_opd.report.runs import Curves, Run
    from stable_opd.report.text import number

    assert number(value) == f"{value:.3g}"
    nothing = Curves(np.zeros(0), {})
    run = Run(Path("x"), "x", nothing, nothing, samples=[{"step": 1, "completion": "a", "grade": value}])
    assert "grade" not in answers([run])

"""A teacher whose scores are kept on disk: read again bit for bit, and never those of another."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from helpers import EOS, TOKENIZER, make_rollout, save, tiny_model
from stable_opd import LocalTeacher, ReverseKL, build
from stable_opd.streaming import known_logprobs
from stable_opd.teachers import CachedTeacher, PrivilegedTeacher, RoutedTeacher, SelfTeacher
from teachers.common import Telling, steps_of

CPU = torch.device("cpu")


class Counting(LocalTeacher):
    """Counts the rows that it reads."""

    def __init__(self, path: str, **options):
        super().__init__(path, **options)
        self.read = 0

    def score(self, rollout):
        self.read += len(rollout)
        return super().score(rollout)


def ready(folder, path, k=3, inner=Counting, tokenizer=TOKENIZER, **options):
    teacher = CachedTeacher(inner(path, **options), str(folder), k)
    teacher.meet(None, TOKENIZER.encode)
    teacher.setup("student", tokenizer, CPU)
    return teacher


def rows():
    return make_rollout([[5, 6, 7], [1, 2], [9], [3, 4, 5, 6]], [[2, 3], [4], [8, 8], [6]])


def assert_same(found, expected):
    for name in ("written", "sampled", "tokens", "logprobs"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name


@pytest.mark.parametrize("k", [0, 3])
def test_what_is_kept_is_what_the_teacher_says_and_is_read_bit_for_bit(tmp_path, teacher_path, k):
    plain = LocalTeacher(teacher_path)
    plain.setup("student", TOKENIZER, CPU)
    expected = known_logprobs(plain.score(rows()), rows().completion, k)
    first = ready(tmp_path, teacher_path, k)
    written = first.score(rows())
    assert_same(written, expected)
    second = ready(tmp_path, teacher_path, k)
    assert_same(second.score(rows()), written)
    assert (first.teacher.read, second.teacher.read) == (4, 0)
    assert (second.support, second.k) == (("topk" if k else "sampled"), k)


def test_teacher_is_not_even_loaded_while_nothing_is_missing(tmp_path, teacher_path):
    first = ready(tmp_path, teacher_path)
    first.score(rows())
    second = ready(tmp_path, teacher_path)
    with second.present():
        second.score(rows())
    with pytest.raises(RuntimeError, match="before its `setup`"):
        _ = second.teacher.model
    assert second.footprint == 0
    assert (second.stop_ids, second.context_length) == (first.stop_ids, first.context_length) == ((EOS,), 96)
    second.setup("student", TOKENIZER, CPU)  # as the module does when the device is known
    second.score(make_rollout([[7]]))
    assert second.teacher.read == 1
    assert second.footprint == first.footprint > 0


def test_only_rows_that_are_missing_are_read_and_all_stand_in_order(tmp_path, teacher_path):
    teacher, whole = ready(tmp_path, teacher_path), rows()
    kept = teacher.score(whole.select(torch.tensor([1, 3])))
    found = teacher.score(whole)
    assert teacher.teacher.read == 4
    places = whole.places(torch.tensor([1, 3]))
    assert torch.equal(found.sampled[places], kept.sampled)
    plain = LocalTeacher(teacher_path)
    plain.setup("student", TOKENIZER, CPU)
    expected = known_logprobs(plain.score(whole), whole.completion, 3)
    torch.testing.assert_close(found.sampled, expected.sampled, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tokens, expected.tokens)


def test_what_is_no_number_is_not_kept(tmp_path, teacher_path):
    """A fault that has passed would come back with every run."""

    class Faulty(Counting):
        """Fails at the second row, the first time."""

        def score(self, rollout):
            states = super().score(rollout)
            if self.read <= len(rollout):
                states.states[rollout.row == 1] = torch.nan
            return states

    teacher = ready(tmp_path, teacher_path, inner=Faulty)
    nan = teacher.score(rows()).sampled.isnan()
    assert torch.equal(nan, rows().row == 1)
    assert teacher.score(rows()).sampled.isfinite().all()
    assert teacher.teacher.read == 5
    assert ready(tmp_path, teacher_path).score(rows()).sampled.isfinite().all()


def test_equal_rows_are_one(tmp_path, teacher_path):
    teacher = ready(tmp_path, teacher_path)
    found = teacher.score(make_rollout([[1, 2, 3], [4], [1, 2, 3]]))
    assert teacher.teacher.read == 2
    assert torch.equal(found.sampled[:3], found.sampled[4:])


def test_where_the_prompt_ends_belongs_to_the_row(tmp_path, teacher_path):
    teacher = ready(tmp_path, teacher_path)
    teacher.score(make_rollout([[2, 3]], [[1]]))
    assert len(teacher.score(make_rollout([[3]], [[1, 2]])).sampled) == 1
    assert teacher.teacher.read == 2


def changed_weight(folder):
    model = tiny_model(2)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    save(model, folder)


def changed_stop(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [EOS, 7]}))


@pytest.mark.parametrize("change", [changed_weight, changed_stop], ids=["one weight", "what ends an answer"])
def test_teacher_that_was_changed_is_not_answered_for(tmp_path, change):
    path = save(tiny_model(2), tmp_path / "teacher")
    before = ready(tmp_path / "scores", path)
    before.score(rows())
    change(tmp_path / "teacher")
    after = ready(tmp_path / "scores", path)
    after.score(rows())
    assert after.teacher.read == 4
    assert (after.stop_ids == before.stop_ids) == (change is changed_weight)


def test_teacher_of_another_precision_is_another_one(tmp_path, teacher_path):
    pytest.importorskip("bitsandbytes")
    ready(tmp_path, teacher_path).score(rows())
    coarse = ready(tmp_path, teacher_path, quantization="int8")
    coarse.score(rows())
    assert coarse.teacher.read == 4


def test_other_number_of_likeliest_tokens_is_kept_beside(tmp_path, teacher_path):
    for k in (3, 0, 3, 0):
        found = ready(tmp_path, teacher_path, k).score(rows())
        assert found.tokens.shape == (10, k)
    assert len(list(tmp_path.iterdir())) == 2


def test_teacher_that_was_copied_is_the_same_one(tmp_path):
    for name in ("one", "two"):
        teacher = ready(tmp_path / "scores", save(tiny_model(2), tmp_path / name))
        teacher.score(rows())
        assert teacher.teacher.read == (4 if name == "one" else 0)


def test_other_vocabulary_is_compared_with_the_teachers_before_it_is_served(tmp_path, teacher_path, student_path):
    ready(tmp_path / "scores", teacher_path).score(rows())
    path = save(tiny_model(1), tmp_path / "strange")
    words = tmp_path / "strange" / "tokenizer.json"
    words.write_text(words.read_text().replace('"#"', '"&"'))
    with pytest.raises(ValueError, match="must have the vocabulary of the student"):
        ready(tmp_path / "scores", teacher_path, tokenizer=AutoTokenizer.from_pretrained(path))


def test_what_else_is_read_of_the_example_belongs_to_the_row(tmp_path, teacher_path):
    inner = lambda path: PrivilegedTeacher(Counting(path), "{golden}")  # noqa: E731
    teacher, found = ready(tmp_path, teacher_path, inner=inner), []
    for golden in ("1", "2", "1"):
        found.append(teacher.score(make_rollout([[1, 2]], fields=[{"golden": golden}])).sampled)
    assert teacher.teacher.teacher.read == 2
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    with pytest.raises(ValueError, match="Expected examples with 'golden'"):
        teacher.check([{}], 4)
    again = ready(tmp_path, teacher_path, inner=inner)  # not loaded
    with pytest.raises(ValueError, match="Expected examples with 'golden'"):
        again.check([{}], 4)
    again.check([{"golden": "1"}], 4)


def test_several_teachers_are_kept_apart_and_read_apart(tmp_path, teacher_path, student_path):
    def inner(path):
        return RoutedTeacher({"a": Counting(path), "b": Counting(student_path)}, "who")

    teacher = ready(tmp_path, teacher_path, inner=inner)
    fields = [{"who": "a"}, {"who": "b"}]
    rollout = make_rollout([[1, 2], [1, 2]], fields=fields)
    found = [teacher.score(rollout.select(rows)).sampled for rows in teacher.apart(rollout, torch.arange(2))]
    assert (found[0] - found[1]).abs().max() > 0.1
    again = ready(tmp_path, teacher_path, inner=inner).score(rollout)  # kept rows are of one kind
    assert torch.equal(again.sampled, torch.cat(found))


def test_teacher_that_tells_log_probs_is_kept_as_well(tmp_path, teacher_path):
    class Said(Telling):
        """Tells five."""

        def __init__(self, path: str):
            super().__init__(path, told=5)

    found = ready(tmp_path, teacher_path, inner=Said).score(rows())
    assert_same(found, ready(tmp_path / "other", teacher_path).score(rows()))
    with pytest.raises(ValueError, match=r"k from 0 to 5, which is what the teacher tells, but got 6"):
        CachedTeacher(Said(teacher_path), "nowhere", 6)
    with pytest.raises(ValueError, match="k from 0, but got -1"):
        CachedTeacher(LocalTeacher(teacher_path), "nowhere", -1)


def test_teacher_that_changes_cannot_be_kept(tmp_path):
    teacher = CachedTeacher(SelfTeacher(), str(tmp_path))
    with pytest.raises(ValueError, match="nothing tells a SelfTeacher from another one"):
        teacher.setup("student", TOKENIZER, CPU)


def test_size_is_said(tmp_path, teacher_path, log_text):
    ready(tmp_path, teacher_path).score(rows())
    ready(tmp_path, teacher_path)
    assert f"{tmp_path}: 4 rows, 0.0 MiB" in log_text()


@pytest.mark.parametrize(("divergence", "options"), [("SampledReverseKL", {}), ("TeacherTopK", {"k": 3})])
def test_run_of_the_same_seed_is_the_same_and_asks_nobody(tmp_path, divergence, options):
    """And its loss is that of the teacher itself."""

    def run():
        teacher = CachedTeacher(Counting("testbed:teacher"), str(tmp_path), 3)
        return steps_of(teacher, build("divergence", divergence, **options)), teacher.teacher.read

    (first, asked), (second, again) = run(), run()
    assert (asked, again) == (16, 0)
    here = steps_of(LocalTeacher("testbed:teacher"), build("divergence", divergence, **options))
    for one, two, expected in zip(first, second, here, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/advantage_mean"):
            assert two[name] == one[name]
            assert one[name] == pytest.approx(expected[name], rel=1e-5)


def test_component_that_reads_more_is_refused():
    with pytest.raises(ValueError, match="but CachedTeacher tells the likeliest tokens"):
        steps_of(CachedTeacher(LocalTeacher("testbed:teacher"), "nowhere", 3), ReverseKL())

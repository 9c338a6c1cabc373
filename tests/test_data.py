"""From files to batches."""

import json

import datasets
import pytest
import torch
from lightning.pytorch import Trainer

from helpers import EOS, TOKENIZER, problems, save, tiny_model, write_jsonl
from stable_opd import LocalTeacher, ModularChains, OPDModule, PeriodicSuffix, PromptDataModule, ReverseKL, StudentOnly
from stable_opd.data import ResumableSampler
from stable_opd.sources import Columns, EvaluationSet, Source

RECORDS = problems(9, seed=4)


@pytest.fixture
def prepare(student_path):
    """Put a data module beside a module in a trainer, as a run does, and set it up."""

    def prepare(data, stage="fit", student=student_path):
        module = OPDModule(student, LocalTeacher(student), ReverseKL(), StudentOnly(), PeriodicSuffix())
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1
        )
        trainer.strategy.connect(module)
        data.trainer = trainer
        data.setup(stage)
        return data

    return prepare


def expected_ids(record):
    return TOKENIZER.encode(record["prompt"]), [*TOKENIZER.encode(record["golden"]), EOS]


def test_jsonl(prepare, tmp_path):
    data = prepare(PromptDataModule(Source(write_jsonl(tmp_path / "a.jsonl", RECORDS)), batch_size=2))
    found = data.examples["train"]
    assert [(example.ids, example.golden) for example in found] == [expected_ids(record) for record in RECORDS]
    assert [dict(example.fields) for example in found] == RECORDS


def as_json(path):
    (path / "a.json").write_text(json.dumps(RECORDS))
    return Source(str(path / "a.json"))


def as_parquet(path):
    datasets.Dataset.from_list(RECORDS).to_parquet(path / "a.parquet")
    return Source(str(path / "a.parquet"))


def as_saved(path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(path / "saved")
    return Source(str(path / "saved"))


def as_saved_splits(path):
    splits = {"rest": datasets.Dataset.from_list(RECORDS), "train": datasets.Dataset.from_list(RECORDS[:1])}
    datasets.DatasetDict(splits).save_to_disk(path / "splits")
    return Source(str(path / "splits"), split="rest")


def as_folder_of_files(path):
    (path / "folder").mkdir()
    write_jsonl(path / "folder" / "rest.jsonl", RECORDS)
    write_jsonl(path / "folder" / "train.jsonl", RECORDS[:1])
    return Source(str(path / "folder"), split="train")


@pytest.mark.parametrize("write", [as_json, as_parquet, as_saved, as_saved_splits])
def test_other_formats_give_the_same_examples(write, prepare, tmp_path):
    data = prepare(PromptDataModule(write(tmp_path), batch_size=2))
    found = data.examples["train"]
    assert [(example.ids, example.golden) for example in found] == [expected_ids(record) for record in RECORDS]
    assert [dict(example.fields) for example in found] == RECORDS


def test_folder_of_files_is_read_by_split(prepare, tmp_path):
    data = prepare(PromptDataModule(as_folder_of_files(tmp_path), batch_size=1))
    assert [dict(example.fields) for example in data.examples["train"]] == RECORDS[:1]


def test_a_file_that_has_changed_is_read_again(prepare, tmp_path):
    """A cache of an earlier run must not be taken for the file."""
    path = tmp_path / "a.jsonl"
    prepare(PromptDataModule(Source(write_jsonl(path, RECORDS[:5])), batch_size=2))
    data = prepare(PromptDataModule(Source(write_jsonl(path, RECORDS[5:])), batch_size=2))
    assert [dict(example.fields) for example in data.examples["train"]] == RECORDS[5:]


def test_columns_are_mapped(prepare, tmp_path):
    renamed = [{"question": r["prompt"], "solution": r["golden"], "answer": r["answer"], "n": 3} for r in RECORDS]
    source = Source(write_jsonl(tmp_path / "a.jsonl", renamed))
    data = prepare(PromptDataModule(source, columns=Columns("question", "solution"), batch_size=2))
    found = data.examples["train"]
    assert [(example.ids, example.golden) for example in found] == [expected_ids(record) for record in RECORDS]
    assert found[0].fields["n"] == 3


def test_examples_without_a_golden_solution_have_none(prepare, tmp_path):
    records = [
        {"prompt": "Q 1 ;", "golden": None},
        {"prompt": "Q 2 ;", "golden": ""},
        {"prompt": "Q 3 ;", "golden": "# 3"},
    ]
    data = prepare(PromptDataModule(Source(write_jsonl(tmp_path / "a.jsonl", records)), batch_size=1))
    assert [example.golden for example in data.examples["train"]] == [None, None, [*TOKENIZER.encode("# 3"), EOS]]


def test_without_a_golden_column_there_are_no_golden_solutions(prepare, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q 1 ;"}]))
    data = prepare(PromptDataModule(source, batch_size=1))
    assert data.examples["train"][0].golden is None
    assert data.longest_golden == 0


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}Q {% else %}# {% endif %}{{ message.content }} ; "
    "{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def chat_student(tmp_path):
    path = save(tiny_model(1), tmp_path / "chat")
    tokenizer = type(TOKENIZER).from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("1 + 2", "Q 1 + 2 ; ="),
        ([{"role": "user", "content": "1 + 2"}], "Q 1 + 2 ; ="),
        (
            [
                {"role": "user", "content": "1"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "3"},
            ],
            "Q 1 ; # 2 ; Q 3 ; =",
        ),
    ],
    ids=["text", "message", "conversation"],
)
def test_chat_template_wraps_text_and_messages(prompt, text, prepare, chat_student, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "golden": "# 3"}]))
    data = prepare(PromptDataModule(source, chat_template=True, batch_size=1), student=chat_student)
    (example,) = data.examples["train"]
    assert example.ids == TOKENIZER.encode(text)
    assert example.golden == [*TOKENIZER.encode("# 3"), EOS]


def test_chat_template_adds_no_second_start_token(prepare, tmp_path):
    path = save(tiny_model(1), tmp_path / "chat")
    tokenizer = type(TOKENIZER).from_pretrained(path)
    tokenizer.add_special_tokens({"bos_token": "Q"})
    tokenizer.backend_tokenizer.post_processor = _starts_with("Q", tokenizer.convert_tokens_to_ids("Q"))
    tokenizer.chat_template = "Q {{ messages[0].content }}"
    tokenizer.save_pretrained(path)
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 2", "golden": "# 3"}]))
    for chat in (True, False):
        data = prepare(PromptDataModule(source, chat_template=chat, batch_size=1), student=path)
        (example,) = data.examples["train"]
        assert example.ids == TOKENIZER.encode("Q 1 + 2")
        assert example.golden == [*TOKENIZER.encode("# 3"), EOS]


def _starts_with(token, number):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def test_messages_without_a_chat_template_are_refused_with_the_way_out(prepare, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "1"}]}]))
    with pytest.raises(ValueError, match=r"text, but got a list.*data\.chat_template=true"):
        prepare(PromptDataModule(source, batch_size=1))


@pytest.mark.parametrize("prompt", ["", None])
def test_prompt_without_text_is_refused(prompt, prepare, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Q 1 ;"}, {"prompt": prompt}]))
    with pytest.raises(ValueError, match=f"every prompt to have some text, but got {prompt!r}"):
        prepare(PromptDataModule(source, batch_size=1))


def test_length_filters_report_what_they_dropped(prepare, tmp_path, log_text):
    records = [
        {"prompt": "Q 1 ;", "golden": "# 1"},  # 3 tokens, 3 with the stop token
        {"prompt": "Q 1 + 1 ;", "golden": "# 2"},  # 5 tokens
        {"prompt": "Q 1 ;", "golden": "1 = 1 ; # 1"},  # 7 with the stop token
        {"prompt": "Q 2 ;", "golden": "2 = 2 # 2"},  # 6
        {"prompt": "Q 1 + 1 + 1 ;", "golden": "1 + 1 = 2 ; 2 + 1 = 3 ; # 3"},  # both; counted once
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    data = PromptDataModule(Source(path), EvaluationSet(path), batch_size=2, max_prompt_tokens=3, max_golden_tokens=6)
    prepare(data)
    assert [dict(example.fields) for example in data.examples["train"]] == [records[0], records[3]]
    # Evaluation needs no golden solution, so its length does not matter there.
    assert [dict(each.fields) for each in data.examples["validation"]] == [records[0], records[2], records[3]]
    assert (
        f"train: 2 examples from {path} (dropped: 2 prompts are too long, 1 golden solutions are too long)"
        in log_text()
    )
    assert f"validation: 3 examples from {path} (dropped: 2 prompts are too long)" in log_text()


def test_nothing_dropped_is_not_reported_as_dropped(prepare, tmp_path, log_text):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    prepare(PromptDataModule(Source(path), batch_size=2, max_prompt_tokens=100))
    assert f"train: 9 examples from {path}\n" in log_text()


def test_filters_that_drop_everything_say_so(prepare, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(ValueError, match=r"at least one example in .*a\.jsonl, but all 9 were dropped \(9 prompts"):
        prepare(PromptDataModule(Source(path), batch_size=2, max_prompt_tokens=2))


def test_longest_lengths_are_those_of_what_was_kept(prepare, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
    data = PromptDataModule(Source(path), batch_size=2)
    assert (data.longest_prompt, data.longest_golden) == (0, 0)
    prepare(data)
    ids, golden = zip(*map(expected_ids, RECORDS), strict=True)
    assert data.longest_prompt == max(map(len, ids))
    assert data.longest_golden == max(map(len, golden))


def test_missing_prompt_column_lists_those_that_exist(prepare, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", [{"question": "1", "answer": "2"}]))
    with pytest.raises(ValueError, match=r"column 'prompt'.*\['question', 'answer'\].*data\.columns\.prompt"):
        prepare(PromptDataModule(source, batch_size=1))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", '{"prompt": "Q"}\n{not json', "Expected JSON in UTF-8, .*a.jsonl, line 2. Mend"),
        ("a.json", '[{"prompt": ', "Expected JSON in UTF-8, .*a.json. Mend"),
        ("a.parquet", "PAR", r"Could not read examples from .*a.parquet.*\.jsonl, \.json or \.parquet"),
    ],
    ids=["jsonl", "json", "parquet"],
)
def test_unreadable_file_is_named_with_the_way_out(name, content, says, prepare, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"(?s){says}"):
        prepare(PromptDataModule(Source(str(tmp_path / name)), batch_size=1))


def empty_jsonl(path):
    (path / "a.jsonl").write_text("")
    return path / "a.jsonl"


def empty_parquet(path):
    datasets.Dataset.from_list(RECORDS).select([]).to_parquet(path / "a.parquet")
    return path / "a.parquet"


def empty_saved(path):
    datasets.Dataset.from_dict({"prompt": [], "golden": []}).save_to_disk(path / "saved")
    return path / "saved"


@pytest.mark.parametrize("write", [empty_jsonl, empty_parquet, empty_saved])
def test_empty_dataset_says_that_it_is_empty(write, prepare, tmp_path):
    path = write(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){path.name}.*empty"):
        prepare(PromptDataModule(Source(str(path)), batch_size=1))


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "no-such-folder"])
def test_missing_source_names_it(path, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)Could not read examples from '{path}' .*hub name"):
        prepare(PromptDataModule(Source(path), batch_size=1))


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.parquet"])
def test_a_missing_file_is_looked_for_on_no_hub_and_named_with_its_whole_path(name, prepare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=f"there is no file {tmp_path / name}"):
        prepare(PromptDataModule(Source(name), batch_size=1))


def test_missing_split_is_named(prepare, tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"(?s)saved' \(split 'train'\)"):
        prepare(PromptDataModule(Source(str(tmp_path / "saved")), batch_size=1))


@pytest.mark.parametrize(
    ("stage", "missing"), [("fit", "train"), ("validate", "validation"), ("predict", "validation")]
)
def test_stage_without_its_source_says_which_option_to_set(stage, missing, prepare):
    with pytest.raises(ValueError, match=rf"`{stage}` needs examples, but data\.{missing} is not set"):
        prepare(PromptDataModule(batch_size=1), stage)


def test_batch_larger_than_the_data_is_refused_with_both_numbers(prepare, tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    with pytest.raises(ValueError, match=r"takes 10 prompts .*batch_size=10.* only 9 usable.*Lower data\.batch_size"):
        prepare(PromptDataModule(source, batch_size=10))
    assert prepare(PromptDataModule(source, batch_size=9)).examples


def test_training_batches_hold_each_example_of_an_epoch_once(prepare, tmp_path):
    data = prepare(PromptDataModule(Source(write_jsonl(tmp_path / "a.jsonl", RECORDS)), batch_size=3))
    batches = list(data.train_dataloader())
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert sorted(index for batch in batches for index in batch.index) == list(range(9))
    assert [index for batch in batches for index in batch.index] != list(range(9))
    for batch in batches:
        for place, index in enumerate(batch.index):
            assert (batch.ids[place], batch.golden[place]) == expected_ids(RECORDS[index])
            assert dict(batch.fields[place]) == RECORDS[index]


def test_evaluation_batches_hold_every_example_in_order(prepare, tmp_path):
    source = EvaluationSet(write_jsonl(tmp_path / "a.jsonl", RECORDS))
    task = ModularChains()
    data = prepare(PromptDataModule(validation=source, task=task, eval_batch_size=4), "validate")
    (loader,) = data.val_dataloader()
    batches = list(loader)
    assert [list(batch.index) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert all(batch.task is task for batch in batches)


def test_each_evaluation_set_has_a_loader_whose_batches_hold_as_many_answers_as_allowed(prepare, tmp_path):
    first, second = (write_jsonl(tmp_path / f"{name}.jsonl", RECORDS[:size]) for name, size in (("a", 9), ("b", 3)))
    task = ModularChains()
    sets = {
        "many": EvaluationSet(first, samples=3),
        "few": EvaluationSet(second, samples=0, task=task),
        "more": EvaluationSet(second, samples=10, temperature=0.5),
    }
    data = PromptDataModule(validation=sets, eval_batch_size=6)
    assert data.most_answers == 0
    batches = [list(loader) for loader in prepare(data, "validate").val_dataloader()]
    assert [[len(batch) for batch in each] for each in batches] == [[2, 2, 2, 2, 1], [3], [1, 1, 1]]
    assert data.most_answers == 10
    assert [each[0].task for each in batches] == [None, task, None]
    options = [each[0].evaluation for each in batches]
    assert [(each.name, each.samples, each.temperature) for each in options] == [
        ("many", 3, None),
        ("few", 0, None),
        ("more", 10, 0.5),
    ]


def test_fit_without_validation_data_has_no_validation(prepare, tmp_path):
    data = prepare(PromptDataModule(Source(write_jsonl(tmp_path / "a.jsonl", RECORDS)), batch_size=3))
    assert data.val_dataloader() == []


def order(steps_done, count=11, batch_size=2, replicas=1, rank=0):
    return list(ResumableSampler(range(count), batch_size, replicas, rank, lambda: steps_done))


def test_order_of_an_epoch_is_a_permutation_without_the_incomplete_batch():
    whole = order(0)
    assert len(whole) == 10
    assert len(set(whole)) == 10
    assert len(ResumableSampler(range(11), 2, 1, 0, lambda: 0)) == 10


def test_epochs_and_seeds_have_orders_of_their_own(monkeypatch):
    assert order(0) != order(5)
    first = order(0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order(0) != first


@pytest.mark.parametrize("step", range(10))
def test_order_goes_on_where_the_global_step_says(step):
    epoch, done = divmod(step, 5)
    assert order(step) == order(5 * epoch)[2 * done :]


@pytest.mark.parametrize("steps_done", [0, 1, 2, 3])
def test_processes_share_the_batches_that_one_process_would_have(steps_done):
    """Two processes with batches of 2 see, step by step, what one with batches of 4 sees."""
    one = order(steps_done, batch_size=4)
    two = [order(steps_done, batch_size=2, replicas=2, rank=rank) for rank in range(2)]
    for start in range(0, len(one), 4):
        place = start // 2
        assert sorted(one[start : start + 4]) == sorted(two[0][place : place + 2] + two[1][place : place + 2])


def test_order_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    order(0)
    assert torch.rand(1) == expected

"""Whether student, teacher and data mean the same prompt."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from stable_opd.data import PromptDataModule
from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.patient import Speaker
from stable_opd.examples import Example

#: Prompts that are written in both chat templates.
PROMPTS = 8

THINK, THOUGHT = "<think>", "</think>"


@check(
    "doubled-start",
    "error",
    "Neither student nor teacher was trained on such a text.",
    "Take {token} out of the column {column!r}; the tokenizer writes it.",
)
def doubled_start(student: Speaker, examples: Sequence[Example], data: PromptDataModule) -> Iterator[Symptom]:
    """Prompts that begin with the start token twice."""
    start = student.tokenizer.bos_token_id
    doubled = sum(start is not None and each.ids[:2] == [start, start] for each in examples)
    if doubled:
        token = str(student.tokenizer.bos_token)
        found = f"{doubled} of {len(examples)} prompts begin with {token!r} twice."
        yield symptom(found, token=token, column=data.columns.prompt)


@check(
    "missing-start",
    "warning",
    "Models that were trained with a start token write and score worse without it.",
    "Let the chat template begin with {{{{ bos_token }}}}, as the tokenizer does with any other text.",
)
def missing_start(student: Speaker, examples: Sequence[Example]) -> Iterator[Symptom]:
    """Prompts that do not begin with the start token, though the tokenizer puts it before a text."""
    start = student.tokenizer.bos_token_id
    if start is None or student.tokenizer.encode("")[:1] != [start]:
        return
    missing = sum(each.ids[0] != start for each in examples)
    if missing:
        yield symptom(f"{missing} of {len(examples)} prompts do not begin with {student.tokenizer.bos_token!r}.")


@check(
    "no-template",
    "note",
    "A teacher that was trained on chats may answer otherwise than it could.",
    "Set data.chat_template: true, unless both models are meant to go on with a plain text.",
)
def no_template(teacher: Speaker, examples: Sequence[Example], data: PromptDataModule) -> Iterator[Symptom]:
    """Prompts without any special token of a chat, where the teacher has a chat template."""
    chat = set(teacher.tokenizer.all_special_ids) - {teacher.tokenizer.bos_token_id}
    plain = not data.chat_template and all(chat.isdisjoint(each.ids) for each in examples)
    if teacher.tokenizer.chat_template and plain:
        yield symptom("The teacher has a chat template, but no prompt is written in one.")


@check(
    "template",
    "warning",
    "The teacher scores answers to prompts of a form that it was not trained on, and wants others, from first to last "
    "token.",
    "Give both one template: copy the teacher's chat_template.jinja into the student's folder, or train the student on "
    "its own first.",
)
def template(
    student: Speaker, teacher: Speaker, examples: Sequence[Example], data: PromptDataModule
) -> Iterator[Symptom]:
    """Prompts in the chat template of the student and in that of the teacher."""
    if not data.chat_template:
        return
    if not teacher.tokenizer.chat_template:
        yield symptom("Prompts are written in the student's chat template, but the teacher has none.")
        return
    for each in examples[:PROMPTS]:
        prompt = each.fields[data.columns.prompt]
        ours, theirs = data.text(prompt, student.tokenizer), _text(data, prompt, teacher.tokenizer)
        if ours != theirs:
            yield symptom(f"The student's chat template writes {_short(ours)}, but the teacher's {_short(theirs)}.")
            return


def _text(data: PromptDataModule, prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return data.text(prompt, tokenizer)
    except ValueError as error:
        return f"nothing, because {error.__cause__ or error}"  # what the template itself says


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:38]} ... {text[-37:]}")


@check(
    "thinking",
    "warning",
    "Teacher and golden solutions pull in two directions, from the first token on, and towards other lengths.",
    "Switch thinking on or off in the student's chat template ({{%- set enable_thinking = false %}} in its first line "
    "switches it off), or take golden solutions {other} thoughts.",
)
def thinking(student: Speaker, examples: Sequence[Example], data: PromptDataModule) -> Iterator[Symptom]:
    """Whether the chat template lets the student think, against the thoughts in golden solutions."""
    written = [str(each.fields[data.columns.golden]) for each in examples if each.golden]
    if not data.chat_template or not written:
        return
    prompt = data.text(examples[0].fields[data.columns.prompt], student.tokenizer).rstrip()
    thoughtful = sum(THOUGHT in each for each in written)
    doubled = sum(each.lstrip().startswith(THINK) for each in written)
    if prompt.endswith(THOUGHT) and thoughtful:
        found = f"The chat template ends with {THOUGHT!r}, but {thoughtful} of {len(written)} golden solutions think."
        yield symptom(found, other="without")
    elif prompt.endswith(THINK) and doubled:
        found = (
            f"The chat template ends with {THINK!r}, and {doubled} of {len(written)} golden solutions begin so, too."
        )
        yield symptom(found, other="that begin inside their")
    elif _thinks(prompt, student) and thoughtful < len(written):
        found = f"The chat template lets the student think, but {len(written) - thoughtful} of {len(written)} golden "
        yield symptom(f"{found}solutions have no {THOUGHT!r}.", other="with")


def _thinks(prompt: str, student: Speaker) -> bool:
    able = "enable_thinking" in str(student.tokenizer.chat_template)
    return prompt.endswith(THINK) or (able and not prompt.endswith(THOUGHT))

"""Whether student, teacher, templates and data agree on where an answer ends."""

from collections.abc import Iterator, Sequence

from stable_opd.data import PromptDataModule
from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.patient import Speaker
from stable_opd.examples import Example
from stable_opd.terminal import StopRule


@check(
    "stop-sets",
    "warning",
    "A right ending of the student's is punished where the teacher would end with another token, so the student "
    "unlearns to stop, and its answers grow to the token budget (arXiv 2609.20511).",
    "Score the stop event over both sets: model.terminal: SemanticClass.",
)
def stop_sets(student: Speaker, teacher: Speaker, stop_rule: StopRule) -> Iterator[Symptom]:
    """Token ids that end an answer of the student and of the teacher, where model.terminal scores each by itself."""
    if student.stop != teacher.stop and stop_rule.teacher is None:
        yield symptom(
            f"The student ends an answer with {student.words(student.stop)}, but the teacher with "
            f"{teacher.words(teacher.stop)}."
        )


@check(
    "generation-stop",
    "warning",
    "Whoever goes by the generation config, as `generate` does, writes on after the end that the student is taught.",
    'Write "eos_token_id": {stop} into the student\'s generation_config.json.',
)
def generation_stop(student: Speaker) -> Iterator[Symptom]:
    """The tokenizer's end-of-sequence token among those of the student's generation config."""
    config, token = student.model.generation_config, student.tokenizer.eos_token_id
    configured = config.eos_token_id if config else None
    several = [each for each in (configured if isinstance(configured, list) else [configured]) if each is not None]
    if token is not None and token not in several:
        yield symptom(
            f"The student's tokenizer ends a text with {student.words(frozenset([token]))}, but its generation config "
            f"with {student.words(frozenset(several))}.",
            stop=sorted([*several, token]),
        )


@check(
    "end-of-turn",
    "warning",
    "A student that ends its turn as the template does is not stopped there, and goes on with the user's next one.",
    'Write "eos_token_id": {stop} into the student\'s generation_config.json.',
)
def end_of_turn(student: Speaker, data: PromptDataModule) -> Iterator[Symptom]:
    """The token with which the chat template ends an assistant's turn, among the student's stop tokens."""
    token = _end_of_turn(student) if data.chat_template else None
    if token is not None and token not in student.stop:
        yield symptom(
            f"The chat template ends a turn with {student.words(frozenset([token]))}, but the student ends an answer "
            f"with {student.words(student.stop)}.",
            stop=sorted([*student.stop, token]),
        )


def _end_of_turn(speaker: Speaker) -> int | None:
    """Return the first special token after what an assistant says; None if there is none."""
    said = "stable-opd"
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    _, kept, rest = str(speaker.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(said)
    if not kept:
        return None
    special = set(speaker.tokenizer.all_special_ids)
    special |= {token for token, each in speaker.tokenizer.added_tokens_decoder.items() if each.special}
    return next((each for each in speaker.tokenizer.encode(rest, add_special_tokens=False) if each in special), None)


@check(
    "pad-is-stop",
    "note",
    "Nothing here, where nothing is padded; but trainers that mask padding in the labels mask the stop token with it, "
    "and a student that was fine-tuned by one has not learned to stop.",
    "If it was, fine-tune again with a padding token of its own: tokenizer.pad_token.",
)
def pad_is_stop(student: Speaker) -> Iterator[Symptom]:
    """The student's padding token against its stop tokens."""
    if student.tokenizer.pad_token_id in student.stop:
        yield symptom(f"The student is padded with {student.tokenizer.pad_token!r}, which ends an answer, too.")


@check(
    "golden-end",
    "error",
    "Golden solutions would teach the student to write on.",
    "End each with {token}.",
)
def golden_end(student: Speaker, examples: Sequence[Example]) -> Iterator[Symptom]:
    """The last token of golden solutions, which has to be a stop token."""
    golden = [each.golden for each in examples if each.golden]
    open_ended = sum(each[-1] not in student.stop for each in golden)
    if open_ended:
        token = student.tokenizer.eos_token or student.words(student.stop)
        yield symptom(f"{open_ended} of {len(golden)} golden solutions do not end with a stop token.", token=token)


@check(
    "golden-stop",
    "warning",
    "They would teach the student to write on after its answer has ended.",
    "Take the stop tokens out of the column {column!r}; one is put behind each solution anyway.",
)
def golden_stop(student: Speaker, examples: Sequence[Example], data: PromptDataModule) -> Iterator[Symptom]:
    """Stop tokens in golden solutions before their end."""
    golden = [each.golden for each in examples if each.golden]
    inside = sum(not student.stop.isdisjoint(each[:-1]) for each in golden)
    if inside:
        found = f"{inside} of {len(golden)} golden solutions have a stop token before their end."
        yield symptom(found, column=data.columns.golden)

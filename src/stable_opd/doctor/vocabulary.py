"""Whether a token id means the same to all."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.patient import Speaker
from stable_opd.models import added_ids


@check(
    "padded-vocabulary",
    "error",
    "The loss would compare distributions over different vocabularies.",
    "Give the {name} its missing rows: load it, call resize_token_embeddings({tokens}), and save it.",
)
def padded_vocabulary(student: Speaker, teacher: Speaker) -> Iterator[Symptom]:
    """Rows of the output layers of student and teacher, up to the tokens that the tokenizer has.

    Families pad their vocabularies to different sizes (151936 and 152064 within Qwen2.5), which is no fault.
    """
    tokens = len(student.tokenizer)
    rows = {each.name: min(tokens, each.model.get_output_embeddings().weight.shape[0]) for each in (student, teacher)}
    if rows["student"] != rows["teacher"]:
        name = min(rows, key=lambda each: rows[each])
        found = f"The tokenizer has {tokens} tokens, but the {name}'s output layer has only {rows[name]} rows."
        yield symptom(found, name=name, tokens=tokens)


@check(
    "added-tokens",
    "warning",
    "Where such a token stands in a prompt or an answer, the teacher reads something else than the student.",
    "Keep them out of prompts: leave data.chat_template out, or give both models a chat template of other tokens.",
)
def added_tokens(student: Speaker, teacher: Speaker) -> Iterator[Symptom]:
    """Tokens that were added to the vocabularies of student and teacher, whose ids have to mean the same."""
    ids = sorted(added_ids(student.tokenizer, teacher.tokenizer))
    names = [each.tokenizer.convert_ids_to_tokens(ids) for each in (student, teacher)]
    # What only the teacher knows is never written.
    differing = [each for each in zip(ids, *names, strict=True) if each[1] is not None and each[1] != each[2]]
    if differing:
        number, ours, theirs = differing[0]
        yield symptom(
            f"{len(differing)} ids of added tokens mean something else to the teacher, such as {number}, which is "
            f"{ours!r} to the student and {theirs!r} to the teacher."
        )

"""Whether a token id means the same to all."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.doctor.patient import Speaker


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

"""Problems of our own in the column layouts in which data sets for mathematics are published, and models for them.

Each layout is named after the set on the hub that has it; the columns are those, the problems are ours.
"""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from helpers import tiny_model, write_jsonl

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def openr1(problem: str, answer: str, generations: list[str], verdicts: list[bool]) -> dict[str, object]:
    """A row of open-r1/OpenR1-Math-220k."""
    solution = f"It is {answer}."
    return {
        "problem": problem,
        "solution": solution,
        "answer": answer,
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "own",
        "uuid": f"own-{problem}",
        "is_reasoning_complete": [True] * len(generations),
        "generations": generations,
        "correctness_math_verify": verdicts,
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": sum(verdicts),
        "messages": [{"content": problem, "role": "user"}, {"content": generations[-1], "role": "assistant"}],
    }


OPENR1 = [
    openr1("What is $2+3$?", "5", [r"2+3=6, \boxed{6}", r"2+3=5, \boxed{5}"], [False, True]),
    openr1("Halve $7$.", r"\frac{7}{2}", [r"\boxed{3.5}"], [True]),
    openr1("Name a prime above $7$.", "11", [r"\boxed{9}"], [False]),
    openr1("What is $3\\cdot4$?", "12", ["3+3+3+3, so " * 12 + r"\boxed{12}", r"\boxed{12}"], [True, True]),
    openr1("What is $1-1$?", "0", ["0 and 0 again, " * 12 + r"\boxed{0}"], [True]),
    openr1("What is $10^2$?", "100", [r"\boxed{100}", r"ten tens, \boxed{100}"], [True, True]),
]

#: Rows of the evaluation sets, by the names that the recipes give them.
EVALUATION = {
    # HuggingFaceH4/MATH-500
    "math500": [
        {
            "problem": "Simplify $\\frac{6}{8}$.",
            "solution": "Divide both by 2: $\\boxed{\\frac{3}{4}}$.",
            "answer": "\\frac{3}{4}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "own/1.json",
        },
        {
            "problem": "Solve $x+1=3$.",
            "solution": "$x=\\boxed{2}$.",
            "answer": "2",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "own/2.json",
        },
    ],
    # math-ai/minervamath
    "minerva": [{"question": "A cart moves 6 m in 2 s. What is its mean speed in m/s?", "answer": "3"}],
    # Hothan/OlympiadBench, OE_TO_maths_en_COMP
    "olympiad": [
        {
            "id": 1,
            "question": "Find all real $x$ with $x^2=4$.",
            "solution": ["Both roots are integers."],
            "final_answer": ["$2$", "$-2$"],
            "context": None,
            "modality": "Text-only",
            "is_multiple_answer": True,
            "unit": None,
            "answer_type": "Numerical",
        }
    ],
    # AI-MO/aimo-validation-amc, whose answers are floating-point numbers
    "amc": [{"id": 0, "problem": "How many edges has a cube?", "answer": 12.0, "url": "own"}],
    # HuggingFaceH4/aime_2024
    "aime24": [
        {
            "id": 60,
            "problem": "How many positive divisors has $12$?",
            "solution": "$3\\cdot2=\\boxed{006}$.",
            "answer": "006",
            "url": "own",
            "year": "2024",
        }
    ],
    # math-ai/aime25
    "aime25": [{"problem": "What is the last digit of $3^4$?", "answer": "1", "id": "0"}],
}

#: A right answer to the first problem of each set.
RIGHT = {
    "math500": r"\boxed{0.75}",
    "minerva": r"\boxed{3}",
    "olympiad": r"\boxed{-2, 2}",
    "amc": r"\boxed{12}",
    "aime24": r"\boxed{6}",
    "aime25": r"\boxed{1}",
}


def write_sets(folder: Path) -> dict[str, str]:
    """Write all sets as files, the training set as ``train``, and return their paths."""
    return {name: write_jsonl(folder / f"{name}.jsonl", rows) for name, rows in {"train": OPENR1, **EVALUATION}.items()}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that reads any text, byte by byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", chat_template=CHAT)


def byte_model(path: Path, seed: int) -> str:
    """Write a tiny random model that reads and writes any text, and return its folder."""
    tokenizer = byte_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model(seed, vocab_size=len(tokenizer), max_position_embeddings=16384, **ids)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.config, LlamaConfig)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)

"""What holds for every component: its docstring, its way through YAML, copies and checkpoints."""

import copy
import inspect
import io
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stable_opd.docstrings import arguments, source
from stable_opd.registry import summary
from stable_opd.testing.subject import Check, Subject, expect, same

#: Kinds that serve and stand for no method, so that there is nothing to cite.
WITHOUT_SOURCE = ("engine", "teacher", "task")


def construction(subject: Subject) -> None:
    """It can be built from its defaults, and the arguments that are given."""
    missing = [
        name
        for name, each in subject.parameters.items()
        if each.default is inspect.Parameter.empty and name not in subject.init_args
    ]
    expect(
        not missing,
        f"Expected a default for every parameter, but got none for {', '.join(missing)}. Give one, or pass a value as "
        "`init_args` if there is no sensible default.",
    )
    subject.build()


def docstring(subject: Subject) -> None:
    """It says what it is, where it comes from and what it takes."""
    cls, first = subject.cls, summary(subject.cls)
    expect(
        bool(vars(cls).get("__doc__")),
        "Expected a docstring, but got none. Its first line is what `stable-opd list` prints.",
    )
    expect(
        bool(re.fullmatch(r"[A-Z\d].*\.", first)),
        f"Expected the docstring's first line to be a sentence, but got {first!r}. Begin with a capital letter, end "
        "with a full stop, and do not break the line.",
    )
    if subject.require_source and subject.kind not in WITHOUT_SOURCE:
        expect(
            bool(source(cls)),
            "Expected a line that begins with `Source: ` in the docstring, but got none. Say which paper, code or "
            "project it comes from (your own is fine), or pass `require_source=False`.",
        )


def parameters(subject: Subject) -> None:
    """Every parameter has a type and is documented, and nothing else is."""
    taken, documented = subject.parameters, arguments(subject.cls)
    untyped = [name for name, each in taken.items() if each.annotation is inspect.Parameter.empty]
    expect(
        not untyped,
        f"Expected a type for every parameter, but got none for {', '.join(untyped)}. The command line checks values "
        "by it.",
    )
    silent = [name for name in taken if not documented.get(name)]
    expect(
        not silent,
        f"Expected every parameter in the `Args:` section of the class's docstring, but got nothing on "
        f"{', '.join(silent)}. Add `{silent[0] if silent else ''}: ...` there.",
    )
    strange = [name for name in documented if name not in taken]
    expect(
        not strange,
        f"Expected the `Args:` section to name parameters of the constructor, but got {', '.join(strange)}. Remove "
        "what is not taken, or take it.",
    )


def yaml(subject: Subject) -> None:
    """YAML, object, YAML, object: the same class and the same arguments; local classes cannot be named."""
    if not subject.nameable:
        return
    config, built = subject.parsed()
    expect(
        type(built) is subject.cls,
        f"Expected a {subject.cls.__name__} from its YAML, but got a {type(built).__name__}. A constructor must not "
        "return something else.",
    )
    lost = [name for name in subject.parameters if name not in (config["component"].get("init_args") or {})]
    expect(
        not lost,
        f"Expected all parameters to be accepted in YAML, but got no place for {', '.join(lost)}. Use types that YAML "
        "can say: numbers, strings, lists, dataclasses, other components.",
    )
    parser = subject.parser()
    written = parser.dump(config, skip_unset=False)  # a null is a value, too
    again = parser.parse_string(written)
    rewritten = parser.dump(again, skip_unset=False)
    expect(
        rewritten == written and type(parser.instantiate(again)["component"]) is subject.cls,
        f"Expected the YAML to be read as it was written, but got\n{rewritten}\nfrom\n{written}\nUse values that YAML "
        "can say.",
    )


def copies(use: Callable[[Any], object]) -> Check:
    """Return the check that a component can be copied and saved after it was used.

    Args:
        use: Uses a component, so that it has something to remember.
    """

    def check(subject: Subject) -> None:
        component = subject.build()
        use(component)
        twin = copy.deepcopy(component)
        expect(type(twin) is type(component), f"Expected a copy of its own class, but got a {type(twin).__name__}.")
        if isinstance(component, nn.Module):
            state(subject, component, twin)

    return check


def state(subject: Subject, component: nn.Module, twin: nn.Module) -> None:
    """Compare a module's state with that of its copy, and with that of a new one that read it from a file."""
    expected = component.state_dict()
    expect(
        same(twin.state_dict(), expected),
        "Expected a copy to have the same state, but got another. Keep what is remembered in plain attributes.",
    )
    file = io.BytesIO()
    torch.save(expected, file)
    file.seek(0)
    try:
        read = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            f"Expected a state that torch.load(weights_only=True) can read, but got: {error} Return tensors, numbers, "
            "strings, lists and dicts from `get_extra_state`."
        ) from error
    other = subject.build()
    other.load_state_dict(read)
    expect(
        same(other.state_dict(), expected),
        "Expected the state of a checkpoint to be taken over, but got another. Let `set_extra_state` take back all "
        "that `get_extra_state` returns.",
    )


def nothing(component: Any) -> None:
    """Use nothing of a component."""


FORM: dict[str, Check] = {
    "construction": construction,
    "docstring": docstring,
    "parameters": parameters,
    "yaml": yaml,
}

"""The table of checks in docs/doctor.md is that of the code."""

import re
from pathlib import Path

from stable_opd.doctor import CHECKS

PAGE = Path(__file__).parent.parent.parent / "docs" / "doctor.md"
HEAD = "| check | severity | what it looks at | what it costs | the fix |\n|---|---|---|---|---|\n"


def cell(text):
    return (
        re.sub(r"(?<!\{)\{(\w+)(!r)?\}(?!\})", lambda braces: braces[1].upper(), text)
        .replace("{{", "{")
        .replace("}}", "}")
    )


def test_table_of_checks_is_current():
    rows = [
        f"| `{each.name}` | {each.severity} | {each.looks_at} | {each.causes} | {cell(each.fix)} |\n"
        for each in CHECKS.values()
    ]
    printed = (
        PAGE.read_text(encoding="utf-8").partition("<!-- checks: begin -->")[2].partition("<!-- checks: end -->")[0]
    )
    assert printed.strip() == (HEAD + "".join(rows)).strip(), f"Write this:\n{HEAD}{''.join(rows)}"

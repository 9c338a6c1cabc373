"""The process that fuzzes one door; started by `python -m benchmarks.fuzz`.

Findings go to a file, each once, and fuzzing goes on; only a hang, memory without bound and the end of the process stop
it.
"""

import json
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stable_opd", "yaml", "jsonargparse"]):
    from benchmarks.fuzz.doors import Finding, enter


def main(door: str, findings: Path, options: list[str]) -> None:
    """Fuzz a door until libFuzzer has had enough; it ends the process.

    Args:
        door: Its name.
        findings: JSONL file for what is found.
        options: Those of libFuzzer, and folders of inputs.
    """
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # libFuzzer reports on the other one
    known = set()
    if findings.exists():
        known = {json.loads(line)["name"] for line in findings.read_text(encoding="utf-8").splitlines()}

    def once(data: bytes) -> None:
        try:
            enter(door, data)
        except Finding as found:
            if found.name not in known:
                known.add(found.name)
                with findings.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"name": found.name, "said": str(found), "input": data.hex()[:20000]}) + "\n")

    atheris.Setup([sys.argv[0], *options], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])

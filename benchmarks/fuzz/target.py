"""The process that fuzzes doors, each in a copy of itself; started by `python -m benchmarks.fuzz`.

It reads a line of JSON for each, and answers with one. Findings go to a file, each once, and fuzzing goes on; only a
hang, memory without bound and the end of the process stop it.
"""

import json
import os
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["stable_opd", "yaml"]):
    from benchmarks.fuzz.doors import Finding, enter


def serve() -> None:
    """Fuzz doors until there is nobody who asks."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            fuzz(asked["door"], Path(asked["findings"]), asked["options"])
        _, status, used = os.wait4(pid, 0)
        told = {"status": os.waitstatus_to_exitcode(status), "seconds": used.ru_utime + used.ru_stime}
        print(json.dumps(told), file=answers, flush=True)


def fuzz(door: str, findings: Path, options: list[str]) -> None:
    """Fuzz a door until libFuzzer has had enough; it ends the process.

    Args:
        door: Its name.
        findings: JSONL file for what is found.
        options: Those of libFuzzer, and folders of inputs.
    """
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
    serve()

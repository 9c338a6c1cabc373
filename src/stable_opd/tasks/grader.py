"""The process in which answers are compared: a script of its own, which needs Math-Verify and nothing of this package.

It says that it is ready, then reads lines of JSON, each the right and the given answer, and writes whether they are
equal. The limits are the kernel's: a timer without a handler ends the process in the midst of C code, where a handler
of Python's would wait for that code to return. So no answer outlives its time, even if nobody is left who waits.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import TextIO

#: What is said before the first answer.
READY = "ready"


def equal(right: str, given: str) -> bool:
    """Whether an answer has the value of the right one, as Math-Verify sees it."""
    from math_verify import parse, verify

    # Their own limits are for the main thread of a patient process; ours are the kernel's.
    expected, found = (parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (right, given))
    return bool(verify(expected, found, timeout_seconds=None))


def limit_memory(size: int) -> None:
    """Let the process take no more than ``size`` bytes of memory, and leave no file behind if it is killed."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size if most == resource.RLIM_INFINITY else min(size, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def serve(seconds: float, answers: TextIO) -> None:
    """Answer line by line until there is nobody who asks."""
    for line in sys.stdin:
        right, given = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        verdict = equal(right, given)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(verdict), file=answers, flush=True)


def main(seconds: float, memory: int) -> None:
    """Load what is needed, say so, and serve."""
    logging.disable()
    limit_memory(memory)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no answer
    if equal("0.5", "\\frac{1}{2}"):
        print(READY, file=answers, flush=True)
        serve(seconds, answers)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))

"""The process of a run: `stable-opd` as in a shell, except for how it ends.

It ends with its runner, and it owns up to a run that was cut short: Lightning answers SIGTERM with exit status 0, which
would pass for a finished run.
"""

import os
import signal
import sys
import threading

STOPPED = 128 + signal.SIGTERM


def main() -> None:
    """Run the command line of this process."""
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from stable_opd.cli import main

    try:
        main()
    except SIGTERMException:
        sys.exit(STOPPED)


def _end_with_the_runner() -> None:
    """Kill everything that this run has started once the runner's end of the pipe is closed."""
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    main()

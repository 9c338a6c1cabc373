"""Servers of the testbed's models on loopback: the stand-in, and vLLM itself where an environment with it is named."""

import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from stable_opd.servers import Server, ServerError
from standing_in import standing_in

SERVE = Path(__file__).parent.parent / "benchmarks" / "vllm" / "serve.py"

#: Both kinds of servers, for fixtures and tests that hold the same of both.
BOTH = ["stand-in", pytest.param("vllm", marks=pytest.mark.vllm)]


@contextmanager
def served(kind: str, path: str, name: str, log: Path):
    """Have a server of one of the testbed's models for the time of a context."""
    if kind == "stand-in":
        with standing_in(path, name) as server:
            yield Server(name, server.url, timeout=60, retries=0)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, SERVE, path, "--name", name, "--port", str(port)]
    with (log / f"{name}.log").open("w") as file:
        process = subprocess.Popen(
            [*command, "--python", os.environ["STABLE_OPD_VLLM"]], stdout=file, stderr=subprocess.STDOUT
        )
    server = Server(name, f"http://127.0.0.1:{port}", timeout=120, retries=0)
    try:
        wait(server, process)
        yield server
    finally:
        process.terminate()
        process.wait(60)


def wait(server: Server, process: subprocess.Popen) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + 300
    while True:
        try:
            server.context_length()
        except ServerError:
            assert process.poll() is None, "vLLM did not start"
            assert time.monotonic() < until
            time.sleep(1)
        else:
            return

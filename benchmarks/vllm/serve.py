"""Serve a model on loopback by vLLM for CPUs, with all that `VLLMEngine` and `VLLMTeacher` ask for.

python benchmarks/vllm/serve.py testbed:student --name student --port 8000 --python FOLDER/bin/python

`docs/vllm.md` has the line for GPUs.
"""

import argparse
import os
import tempfile
from pathlib import Path

from stable_opd.engines.handing_over import write_weights
from stable_opd.models import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or one of the testbed's, such as testbed:student")
    parser.add_argument("--name", required=True, help="name to serve it under")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--python", required=True, help="the interpreter of an environment that setup.sh made")
    chosen = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stable-opd-served-"))
    # With the head apart from the embeddings: vLLM keeps a packed copy of it on a CPU, which no route renews.
    write_weights(load_model(chosen.model).eval(), folder)
    load_tokenizer(chosen.model).save_pretrained(folder)
    command = [chosen.python, "-m", "vllm.entrypoints.openai.api_server"]  # the command vllm wants a package vllm
    command += ["--model", str(folder), "--served-model-name", chosen.name]
    command += ["--host", "127.0.0.1", "--port", str(chosen.port)]
    command += ["--enforce-eager", "--dtype", "float32", "--max-logprobs", "64"]
    command += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two servers would both take the first core
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # of another environment
    os.execve(chosen.python, command, inherited | environment)


if __name__ == "__main__":
    main()

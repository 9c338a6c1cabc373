"""Results as Markdown tables."""

import platform
import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

Result = dict[str, Any]
PACKAGES = ("stable-opd", "trl", "torch", "lightning", "transformers", "accelerate")


def versions() -> dict[str, str]:
    """Return the versions that the numbers belong to."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the smoke run goes without the other side
            continue
    return found


def machine(device: str) -> str:
    """Return the name of what the numbers were taken on."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def interval(result: Result) -> str:
    """Return a ratio with its confidence interval."""
    return f"{result['value']:.2f} [{result['low']:.2f}, {result['high']:.2f}]"


def spread(side: Result) -> str:
    """Return a median with its quartiles, in milliseconds."""
    return f"{side['step_ms']:.4g} ({side['step_ms_q1']:.4g} to {side['step_ms_q3']:.4g})"


def mib(size: float) -> str:
    """Return bytes as MiB."""
    return f"{size / 2**20:.1f}"


def steps_section(results: Sequence[Result]) -> str:
    """Return the tables of whole steps."""
    head = ["cell", "throughput, ratio", "rollout, ratio", "memory, ratio", "ours, ms", "TRL, ms", "TRL's cache"]
    rows = [
        [
            each["cell"],
            interval(each["throughput"]),
            interval(each["rollout"]),
            f"{each['memory']:.2f}",
            spread(each["ours"]),
            spread(each["trl"]),
            each["cache"],
        ]
        for each in results
    ]
    throughput = [each["throughput"]["value"] for each in results]
    worst = min(results, key=lambda each: each["throughput"]["value"])
    more = ["cell", "side", "tokens/step", "tokens/s", "rollout tokens/s", "peak, MiB", "overhead, ms", "overhead"]
    detail = [
        [
            each["cell"],
            side,
            f"{figures['tokens_per_step']:.0f}",
            f"{figures['tokens_per_s']:.0f}",
            f"{figures['rollout_tokens_per_s']:.0f}",
            mib(figures["peak_bytes"]),
            f"{figures['overhead_ms']:.2f}" if "overhead_ms" in figures else "-",
            f"{figures['overhead_share']:.1%}" if "overhead_share" in figures else "-",
        ]
        for each in results
        for side, figures in (("ours", each["ours"]), ("TRL", each["trl"]))
    ]
    return "\n\n".join(
        [
            "## Whole training steps",
            "Ratios above 1 are in our favour: generated tokens per second of the whole step, the same of the rollout "
            "alone, and TRL's peak memory over ours. Times are medians of a step, with quartiles.",
            table(head, rows),
            f"Throughput: geometric mean {geometric_mean(throughput):.2f}, worst cell {worst['cell']} with "
            f"{worst['throughput']['value']:.2f}.",
            table(more, detail),
        ]
    )


def objective_section(results: Sequence[Result]) -> str:
    """Return the table of what the whole objective costs."""
    rows = [[each["cell"], spread(each["plain"]), spread(each["whole"]), interval(each["cost"])] for each in results]
    return "\n\n".join(
        [
            "## The whole objective",
            "Our step with plain distillation, and with golden rows and the reference KL too; the cost is the time per "
            "generated token of the second over the first.",
            table(["cell", "plain, ms", "whole, ms", "cost, ratio"], rows),
        ]
    )


def losses_section(results: Sequence[Result]) -> str:
    """Return the table of the loss alone."""
    head = ["cell", "TRL / ours, time", "TRL / ours, scratch", "exact / sampled", "ours / bare products"]
    head += ["ours, ms", "TRL, ms", "ours, MiB", "TRL, MiB"]
    rows = [
        [
            each["cell"],
            interval(each["time"]),
            f"{each['memory']:.1f}",
            interval(each["exact_over_sampled"]),
            interval(each["over_bare"]),
            spread(each["ours"]),
            spread(each["trl"]),
            mib(each["ours"]["scratch_bytes"]),
            mib(each["trl"]["scratch_bytes"]),
        ]
        for each in results
    ]
    return "\n\n".join(
        [
            "## The loss alone",
            "Forward and backward from hidden states, N positions and V tokens. Scratch is the peak memory beyond the "
            "inputs and the gradients of hidden states and head. Bare products are the matrix products alone.",
            table(head, rows),
        ]
    )


def memory_section(points: Sequence[Result]) -> str:
    """Return the table of the loss's memory at a large vocabulary."""
    rows = [[p["cell"], mib(p["scratch_bytes"]), f"{p['share_of_logits']:.4f}"] for p in points]
    head = ["cell", "scratch, MiB", "share of one float32 tensor of logits"]
    return "\n\n".join(["## Memory of the loss", "Our loss at width 16.", table(head, rows)])


def linearity_section(result: Result) -> str:
    """Return the table of step time against tokens."""
    rows = [
        [p["cell"], f"{p['tokens']:.0f}", f"{p['padded']:.0f}", f"{p['longest']:.0f}", f"{1e3 * p['seconds']:.1f}"]
        for p in result["points"]
    ]
    head = ["cell", "real tokens", "tokens if padded", "longest answer", "step, ms"]
    return "\n\n".join(
        [
            "## Cost against tokens",
            f"Fitted, our step takes {result['ms_per_decoding_step']:.3g} ms for each token of the longest answer "
            f"(so often it decodes) and {result['us_per_token']:.3g} us for each real token of prompts and answers. "
            f"The largest relative error is {result['largest_error']:.0%}, and {result['largest_error_padded']:.0%} if "
            "padded tokens are taken for real ones.",
            table(head, rows),
        ]
    )


def roofline_section(shares: Sequence[Result]) -> str:
    """Return the table of the decoding's share of the memory bandwidth."""
    rows = [[s["cell"], f"{s['bytes_per_s'] / 1e9:.0f}", f"{s['most']:.0f}", f"{s['share']:.2f}"] for s in shares]
    head = ["cell", "copy, GB/s", "tokens/s at most", "share reached"]
    return "\n\n".join(["## Decoding against the memory bandwidth", table(head, rows)])


def smoke_section(result: Result) -> str:
    """Return the table of the smoke run."""
    head = ["cell", "default / fallback, rollout", "default, ms", "fallback, ms"]
    row = [result["cell"], interval(result["rollout"]), spread(result["default"]), spread(result["fallback"])]
    return "\n\n".join(["## Our engines", table(head, [row])])


def gate_section(gate: Result) -> str:
    """Return what was checked before the timing."""
    return (
        f"Checked before timing: {gate['greedy_rows_that_differ']} of {gate['greedy_rows']} greedy answers differ from "
        f"those of `generate`, the losses of one batch differ by {gate['relative_difference']:.1e} of their size, the "
        f"cosine of its gradients is {gate['cosine']:.8f}."
    )


SECTIONS: dict[str, Callable[[Any], str]] = {
    "steps": steps_section,
    "objective": objective_section,
    "losses": losses_section,
    "memory": memory_section,
    "linearity": linearity_section,
    "roofline": roofline_section,
    "smoke": smoke_section,
}


def markdown(results: Result) -> str:
    """Return the whole page."""
    about = results["about"]
    head = [
        "# Speed beside TRL's DistillationTrainer",
        f"Made by `{about['command']}` on {about['machine']}, threads: {about['threads']}, {about['precision']}; "
        + ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        + ".",
    ]
    if results.get("gate"):
        head.append(gate_section(results["gate"]))
    sections = [section(results[name]) for name, section in SECTIONS.items() if results.get(name)]
    return "\n\n".join([*head, *sections]) + "\n"

"""torch.profiler over a few steps: which kernels the time goes to, by kind, and how long the GPU waits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sbtrain.bench import trace
from sbtrain.bench.record import aligned
from sbtrain.bench.timing import synchronize

NUM_ROWS = 25


def profile_steps(step, *, num_steps: int, device: torch.device, flops: dict[str, float], out: Path) -> dict:
    """Run step() num_steps times under the profiler and write OUT.txt and OUT.trace.json (for a trace viewer).

    flops: category -> useful FLOPs of one step, to turn times into rates. Returns what was found, with the same text
    under "text"; times are milliseconds a step. Profiling slows the host down: idle time is an upper bound.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        for _ in range(num_steps):
            step()
        synchronize(device)
    path = out.with_name(f"{out.name}.trace.json")
    profiler.export_chrome_trace(str(path))
    found = trace.kernels(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])
    if on_gpu and found:
        summary = summarize(found, num_steps=num_steps, flops=flops)
        operations = profiler.key_averages().table(sort_by="self_device_time_total", row_limit=60)
    else:
        summary = {"text": "no GPU: operations by host time are in the file"}
        operations = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=NUM_ROWS)
    out.with_name(f"{out.name}.txt").write_text(f"{summary['text']}\n\n{operations}\n", encoding="utf-8")
    return summary


def summarize(found: list[trace.Kernel], *, num_steps: int, flops: dict[str, float]) -> dict:
    """Shares by category, the largest kernels and the idle share, as values and as text."""
    step_ms, busy_ms = (us / 1e3 / num_steps for us in (trace.span_us(found), trace.busy_us(found)))
    idle = 1 - busy_ms / step_ms
    exposed = {name: trace.exposed_us(found, name) / 1e3 / num_steps for name in ("sp", "collectives")}
    categories = {name: us / 1e3 / num_steps for name, us in trace.by_category(found).items()}
    shares = [
        (name, f"{ms:.2f}", f"{ms / step_ms:.1%}", f"{flops[name] / ms / 1e9:.0f}" if flops.get(name) else "-")
        for name, ms in categories.items()
    ]
    shares += [(f"{name}, exposed", f"{ms:.2f}", f"{ms / step_ms:.1%}", "-") for name, ms in exposed.items() if ms]
    shares.append(("idle", f"{step_ms - busy_ms:.2f}", f"{idle:.1%}", "-"))
    tops = [
        {"kernel": name, "owner": owner, "category": category, "runs": runs / num_steps, "ms": us / 1e3 / num_steps}
        for category, name, owner, runs, us in trace.by_kernel(found)[:NUM_ROWS]
    ]
    rows = [
        (top["kernel"][:70], top["owner"][:45], top["category"], f"{top['runs']:g}", f"{top['ms']:.3f}") for top in tops
    ]
    text = "\n\n".join(
        [
            f"{step_ms:.1f} ms a step under the profiler, GPU idle {idle:.1%}",
            aligned(("kind", "ms/step", "share", "TFLOP/s"), shares),
            aligned(("kernel", "launched by", "kind", "runs/step", "ms/step"), rows),
        ]
    )
    return {
        "step_ms": step_ms,
        "idle_share": idle,
        "categories_ms": categories,
        "exposed_ms": exposed,
        "kernels": tops,
        "text": text,
    }

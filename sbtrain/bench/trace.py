"""Where a GPU's time goes, read from a trace of torch.profiler: kernels with the operation that launched them.

A kernel's name alone often says little (`forward`, `elementwise_kernel`), so every kernel is traced back to its launch,
and that to the operations that were open on the launching thread.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCH = ("cuda_runtime", "cuda_driver")
_RANGE = ("cpu_op", "user_annotation")
_BACKWARD = "autograd::engine::evaluate_function: "

_GEMM = re.compile(r"gemm|nvjet|cutlass_.*(tensorop|wgmma)|xmma|splitKreduce|cublas", re.I)
_KERNELS = (
    ("attention", re.compile(r"sdpa|fmha|flash|flex_attention|triton_tem_fused(?!_(mm|addmm|bmm))", re.I)),
    ("gla", re.compile(r"gla|chunk_(fwd|bwd)_kernel|cumsum", re.I)),
    ("loss", re.compile(r"cross_entropy|softmax|nll_loss", re.I)),
)
_COMMUNICATION = re.compile(r"nccl|mccl", re.I)
_SEQUENCE = re.compile(r"_Leave|_Enter|_Fetch|_AllToAll")
"""The autograd functions that call sequence parallelism's collectives (parallel/)."""
_OWNERS = (
    ("optimizer", re.compile(r"bench: optimizer")),
    ("attention", re.compile(r"scaled_dot_product|flex_attention|_Attention", re.I)),
    ("gla", re.compile(r"GLA|gated_linear", re.I)),
    ("loss", re.compile(r"_?Losses|cross_?entropy", re.I)),
    ("norm", re.compile(r"rms_?norm", re.I)),
    ("swiglu", re.compile(r"swiglu|silu", re.I)),
    ("rope", re.compile(r"rope|rotary", re.I)),
    ("dispatch", re.compile(r"_Depart|_Sort|_Combine")),
    ("gradient buffers", re.compile(r"AccumulateGrad")),
    ("embedding", re.compile(r"embedding", re.I)),
    ("compiled, fused", re.compile(r"CompiledFunction|Torch-Compiled|CompiledFx", re.I)),
)


@dataclass(frozen=True)
class Kernel:
    """One run of a kernel (or copy) on the device. owners: operations open at its launch, outermost first."""

    name: str
    start_us: float
    duration_us: float
    owners: tuple[str, ...]

    @property
    def owner(self) -> str:
        """The outermost operation: what autograd or the model called."""
        names = [name.removeprefix(_BACKWARD) for name in self.owners if not name.startswith("bench: ")]
        return names[0] if names else ""

    @property
    def category(self) -> str:
        """gemm, attention, gla, loss, norm, swiglu, rope, embedding, optimizer, ... or other; of collectives, `sp` for
        those of sequence parallelism and `collectives` for the others."""
        if _COMMUNICATION.search(self.name):
            return "sp" if _SEQUENCE.search(" ".join(self.owners)) else "collectives"
        if _GEMM.search(self.name):
            return "gemm"
        owners = " ".join(self.owners)
        tests = [(name, pattern, self.name) for name, pattern in _KERNELS if "bench: optimizer" not in owners]
        tests += [(name, pattern, owners) for name, pattern in _OWNERS]
        return next((name for name, pattern, text in tests if pattern.search(text)), "other")

    @property
    def communicates(self) -> bool:
        """Whether it is a collective, or packs or combines what one of sequence parallelism carries."""
        return self.category in ("sp", "collectives") or bool(_SEQUENCE.search(" ".join(self.owners)))


def kernels(events: list[dict]) -> list[Kernel]:
    """All device work of a chrome trace's `traceEvents`, by start."""
    complete = [event for event in events if event.get("ph") == "X"]
    owners = _owners_of_launches(complete)
    found = [
        Kernel(event["name"], event["ts"], event["dur"], owners.get(_correlation(event), ()))
        for event in complete
        if event.get("cat") in _DEVICE
    ]
    return sorted(found, key=lambda kernel: kernel.start_us)


def busy_us(found: list[Kernel]) -> float:
    """Time during which at least one kernel ran; kernels by start."""
    return sum(stop - start for start, stop in _merged(found))


def exposed_us(found: list[Kernel], category: str) -> float:
    """Time during which a collective of this category runs and nothing that computes; kernels by start.

    What packs and combines for sequence parallelism's collectives does not count as computing.
    """
    wanted = _merged([kernel for kernel in found if kernel.category == category])
    computing = _merged([kernel for kernel in found if not kernel.communicates])
    hidden = sum(
        max(0.0, min(stop, other_stop) - max(start, other_start))
        for start, stop in wanted
        for other_start, other_stop in computing
        if other_start < stop and start < other_stop
    )
    return sum(stop - start for start, stop in wanted) - hidden


def _merged(found: list[Kernel]) -> list[tuple[float, float]]:
    """(start, end) of the stretches during which one of the kernels runs at least."""
    stretches: list[tuple[float, float]] = []
    for kernel in found:
        stop = kernel.start_us + kernel.duration_us
        if stretches and kernel.start_us <= stretches[-1][1]:
            stretches[-1] = stretches[-1][0], max(stop, stretches[-1][1])
        else:
            stretches.append((kernel.start_us, stop))
    return stretches


def span_us(found: list[Kernel]) -> float:
    """From the first kernel's start to the last one's end."""
    return max(k.start_us + k.duration_us for k in found) - min(k.start_us for k in found)


def by_category(found: list[Kernel]) -> dict[str, float]:
    """Category -> microseconds, largest first."""
    sums: dict[str, float] = defaultdict(float)
    for kernel in found:
        sums[kernel.category] += kernel.duration_us
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def by_kernel(found: list[Kernel]) -> list[tuple[str, str, str, int, float]]:
    """(category, kernel, owner, runs, microseconds) of equal kernels together, largest first."""
    groups: dict[tuple, list[float]] = defaultdict(list)
    for kernel in found:
        groups[kernel.category, kernel.name, kernel.owner].append(kernel.duration_us)
    rows = [(*key, len(times), sum(times)) for key, times in groups.items()]
    return sorted(rows, key=lambda row: -row[-1])


def _correlation(event: dict):
    return event.get("args", {}).get("correlation")


def _owners_of_launches(events: list[dict]) -> dict:
    """correlation -> names of the ranges open on the launching thread, outermost first."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") in _RANGE or (event.get("cat") in _LAUNCH and _correlation(event) is not None):
            threads[event["pid"], event["tid"]].append(event)
    owners = {}
    for thread in threads.values():
        open_ranges: list[dict] = []
        # of two that start together the longer one encloses the other
        for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
            while open_ranges and open_ranges[-1]["ts"] + open_ranges[-1]["dur"] <= event["ts"]:
                open_ranges.pop()
            if event["cat"] in _RANGE:
                open_ranges.append(event)
            else:
                owners[_correlation(event)] = tuple(open_range["name"] for open_range in open_ranges)
    return owners

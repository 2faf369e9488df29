"""bench train: the engine's training step beside the same parts assembled by hand, one after the other in one process;
under torchrun, the engine's step on layouts of sequence parallelism.

Peers run in the order given, and all of them again in every round, so that a drift of the machine shows as a difference
between rounds and not between peers. They start from the same weights and run the same batch: their first losses and
gradient norms must agree, or the comparison is void.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

import ops
from parallel.collectives import together
from parallel.layout import Layout
from parallel.mesh import device, start_distributed
from sbtrain.bench.expert_load import ExpertLoad, forced_shares
from sbtrain.bench.hand_kernels import kernel_names
from sbtrain.bench.layouts import check_world, sequence_layout_of
from sbtrain.bench.options import demand_positive
from sbtrain.bench.peers import PEERS, Work
from sbtrain.bench.profile import profile_steps
from sbtrain.bench.record import aligned, machine, peak_tflops, save, shown
from sbtrain.bench.shapes import model_config
from sbtrain.bench.timing import release_memory, spread, time_steps
from sbtrain.config.moe_rules import experts_problem, has_experts
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import ModelConfig, Precision, Recompute, Stage
from sbtrain.config.typed import plain
from sbtrain.model.flops import TRAINING_FORWARDS, flops_per_token, training_flops_per_token

FILE = "bench_train.json"
TOLERANCES = {Precision.bf16: (1e-3, 2e-2), Precision.fp32: (1e-5, 1e-4)}
"""Relative difference of the peers' first losses and gradient norms beyond which they do not run the same step."""
NUM_PROFILED_STEPS = 2
MATRIX_PARTS = ("projections", "gate", "mlp", "router", "experts", "shared_experts", "lm_head")


@dataclass(frozen=True)
class TrainOptions:
    """Keys of `bench.py train`.

    model: `tiny` or a recipe whose shape is taken (7b: Qwen2.5-7B). layers: depth. patterns: layer patterns, run one
    after the other. seq_len: tokens of a document on each of its ranks; micro_batch: documents a row; rows: forward
    and backward passes a step (the engine alone knows more than one). sp: over how many
    ranks a document is cut, with seq_len tokens on each: N, or N:lasp2, N:zeco, N:ulysses for the way of its linear
    attention; several are run one after the other, each on all ranks of torchrun. ep: over how many of the ranks the
    experts of layers marked `:m` are spread; experts.*: how they are run (docs/moe.md); expert_load: natural, as the
    router of random weights deals, or forced: balanced, or skewed, where the first expert gets the share hot_share
    and the others the rest evenly. MFU counts the parameters that a token meets. recompute: levels, all of them run in
    every round. steps: timed ones, after warmup. rounds: how often all peers run. profile: where the time of each peer
    goes, in the first round.
    deterministic: as with runtime.deterministic, for all peers of this process (its cost: two processes).
    peak_tflops: of the device; 0 takes it by the device's name. out: folder of bench_train.json and profiles.
    """

    model: str = "7b"
    layers: int = 8
    patterns: tuple[str, ...] = ("LS",)
    seq_len: int = 8192
    micro_batch: int = 1
    rows: int = 1
    sp: tuple[str, ...] = ("1",)
    ep: int = 1
    experts: ExpertsConfig = PLAIN
    expert_load: ExpertLoad = ExpertLoad.natural
    hot_share: float = 0.5
    precision: Precision = Precision.bf16
    recompute: tuple[Recompute, ...] = (Recompute.none,)
    steps: int = 10
    warmup: int = 4
    peers: tuple[str, ...] = ("hand", "engine")
    rounds: int = 2
    profile: bool = False
    deterministic: bool = False
    peak_tflops: float = 0.0
    out: str = "runs/bench"


def bench_train(options: TrainOptions, command: str) -> int:
    """Measure, print and save. Returns 0, or 1 if the peers did not agree. Raises ValueError for bad options."""
    demand_positive(options, "layers", "seq_len", "micro_batch", "rows", "steps", "rounds", "ep")
    if options.warmup < 1:
        raise ValueError(f"warmup={options.warmup} must be at least 1, because the first step compiles")
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        raise ValueError(f"peers={unknown[0]} is not known; choose from: {', '.join(PEERS)}")
    models = [model_config(options.model, num_layers=options.layers, pattern=name) for name in options.patterns]
    start_distributed(deterministic=options.deterministic)
    layouts = {name: replace(sequence_layout_of(name), ep=options.ep) for name in options.sp}
    check_world(layouts, options.peers)
    check_experts(options, models)
    if options.rows > 1 and "hand" in options.peers:
        raise ValueError("peers=hand runs one row a step; write peers=engine or rows=1")
    report = {
        "benchmark": "train",
        "command": command,
        "options": plain(options),
        "machine": machine(device()),
        "peak_tflops": peak_tflops(device(), options.peak_tflops),
        "models": [plain(model) for model in models],
        "ops": ops.table(),
        "hand": kernel_names(device()),
        "results": [],
        "comparisons": [],
    }
    _keep(options, report)
    _say(_title(report))
    for model in models:
        for name, layout in layouts.items():
            _bench_model(model, name, layout, options, report)
    path = _keep(options, report)
    _say(f"\n{summary(report)}\n\n{path}")
    return 0 if all(comparison["agree"] for comparison in report["comparisons"]) else 1


def check_experts(options: TrainOptions, models: list[ModelConfig]) -> None:
    """Raise ValueError for keys of experts that these models or this world cannot follow."""
    if options.ep > 1 and dist.get_world_size() % options.ep:
        raise ValueError(f"ep={options.ep} does not divide the {dist.get_world_size()} ranks of torchrun")
    for model in models:
        for recompute in options.recompute:
            problem = experts_problem(
                model, Stage(layout=Layout(ep=options.ep), recompute=recompute, experts=options.experts)
            )
            if problem:
                raise ValueError(problem)
        if not has_experts(model):
            if options.ep > 1 or options.expert_load is not ExpertLoad.natural:
                raise ValueError(f"ep and expert_load need layers with :m, which patterns={model.pattern} lacks")
        elif model.moe.num_experts % options.ep:
            raise ValueError(f"ep={options.ep} does not divide the {model.moe.num_experts} experts")
        elif "hand" in options.peers:
            raise ValueError("peers=hand knows no mixtures of experts; write peers=engine")
    if not 0 < options.hot_share <= 1:
        raise ValueError(f"hot_share={options.hot_share} must be above 0 and at most 1")


def _keep(options: TrainOptions, report: dict) -> Path | None:
    """Save the report, on rank 0; all ranks raise what it raises."""
    return together(lambda: save(options.out, FILE, report) if dist.get_rank() == 0 else None)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _bench_model(model: ModelConfig, sp: str, layout: Layout, options: TrainOptions, report: dict) -> None:
    """All rounds of one pattern on one layout; the report is saved after every peer."""
    seq_len = options.seq_len * layout.sp
    sizes = (options.micro_batch, seq_len, layout, options.rows)
    work = Work(model, options.precision, Recompute.none, *sizes)
    if has_experts(model):
        forced = forced_shares(options.expert_load, model.moe.num_experts, hot_share=options.hot_share)
        work = replace(work, experts=options.experts, forced=forced)
    for number in range(1, options.rounds + 1):
        for level in options.recompute:
            about = {"pattern": model.pattern, "round": number, "sp": sp, "ep": layout.ep, "recompute": level.name}
            _bench_peers(about, replace(work, recompute=level), options, report)


def _bench_peers(about: dict, work: Work, options: TrainOptions, report: dict) -> None:
    """All peers once, one after the other, and how they compare."""
    by_peer = {}
    for name in options.peers:
        result = {**about, "peer": name}
        result.update(_measure(name, work, options, peak=report["peak_tflops"], profiled=about["round"] == 1))
        by_peer[name] = result
        report["results"].append(result)
        _keep(options, report)
        _say(_line(result))
    if not {"engine", "hand"} - by_peer.keys():
        comparison = compare(by_peer["engine"], by_peer["hand"], options.precision)
        if comparison is not None:
            report["comparisons"].append({**about, **comparison})


def _measure(name: str, work: Work, options: TrainOptions, *, peak: float, profiled: bool) -> dict:
    """Build a peer, time it, close it. Out of memory is a result, too, where no other rank waits."""
    place = device()
    before = release_memory(place)
    result: dict = {"memory_before_bytes": before}
    try:
        result.update(_timed(name, work, options, peak=peak, profiled=profiled))
    except torch.OutOfMemoryError as error:
        if dist.get_world_size() > 1:
            raise
        result["error"] = f"out of memory: {str(error).splitlines()[0]}"
    release_memory(place)
    return result


def _timed(name: str, work: Work, options: TrainOptions, *, peak: float, profiled: bool) -> dict:
    place, began = device(), time.perf_counter()
    peer = PEERS[name](work)
    try:
        timing = time_steps(peer.step, num_warmup=options.warmup, num_steps=options.steps, device=place)
        seconds = time.perf_counter() - began
        memory = torch.cuda.max_memory_allocated() if place.type == "cuda" else None
        extra = {"profile": _profiled(name, peer, work, options)} if options.profile and profiled else {}
    finally:
        peer.close()
    results = [(float(loss), float(norm)) for loss, norm in timing.results]
    return {
        "step_ms": spread(timing.steps_ms),
        "steps_ms": timing.steps_ms,
        "parts_ms": {part: spread(times)["median"] for part, times in timing.parts_ms.items()},
        **speed(work, spread(timing.steps_ms)["median"], peak),
        "peak_memory_bytes": memory,
        "sp_choices": peer.sp_choices,
        "model_metrics": peer.metrics,
        "losses": [loss for loss, _ in results],
        "grad_norms": [norm for _, norm in results],
        "whole_s": seconds,
        **extra,
    }


def speed(work: Work, step_ms: float, peak: float) -> dict:
    """tokens_per_s, tflops and mfu (None without a peak) of each rank, by sbtrain.model.flops."""
    tokens_per_s = work.rows * work.micro_batch * work.seq_len / work.layout.sp / step_ms * 1e3
    tflops = tokens_per_s * training_flops_per_token(work.model, work.seq_len) / 1e12
    return {"tokens_per_s": tokens_per_s, "tflops": tflops, "mfu": tflops / peak if peak else None}


def compare(engine: dict, hand: dict, precision: Precision) -> dict | None:
    """ratio: the engine's speed over the peer's (hand ms / engine ms); differences of the first step, relative to the
    peer's; agree: whether they are within rounding. None if one of them did not run."""
    if "error" in engine or "error" in hand:
        return None
    differences = {
        f"{key}_difference": abs(engine[of][0] - hand[of][0]) / abs(hand[of][0])
        for key, of in (("loss", "losses"), ("grad_norm", "grad_norms"))
    }
    within = [difference <= limit for difference, limit in zip(differences.values(), TOLERANCES[precision])]
    return {"ratio": hand["step_ms"]["median"] / engine["step_ms"]["median"], **differences, "agree": all(within)}


def file_name(pattern: str) -> str:
    """A layer pattern as a part of a file name, in letters, digits, `_` and `-`: `(LS) x 2 F:m` is `L_Sx2F-m`."""
    pairs = re.sub(r"\((\w)(\w)\)", r"\1_\2", pattern.replace(" ", ""))
    return re.sub(r"[^\w]", "-", pairs)


def _profiled(name: str, peer, work: Work, options: TrainOptions) -> dict:
    parts = flops_per_token(work.model, work.seq_len)
    steps = TRAINING_FORWARDS * work.rows * work.micro_batch * work.seq_len / work.layout.sp
    flops = {
        "gemm": steps * sum(parts[part] for part in MATRIX_PARTS),
        "attention": steps * (parts["full_attention"] + parts["sliding_window"]),
        "gla": steps * parts["gated_linear_attention"],
    }
    sp = "" if dist.get_world_size() == 1 else f"_sp{work.layout.sp}_{work.layout.sp_algorithm.L.name}"
    level = "" if len(options.recompute) == 1 else f"_{work.recompute.name}"
    out = Path(options.out) / f"profile_{file_name(work.model.pattern)}_{name}{sp}{level}"

    def step():
        peer.step(lambda part: None)

    if dist.get_rank() > 0:  # takes part; rank 0 looks
        for _ in range(NUM_PROFILED_STEPS):
            step()
        return {}
    found = profile_steps(step, num_steps=NUM_PROFILED_STEPS, device=device(), flops=flops, out=out)
    what = f"profile of {name}, {work.model.pattern}, recompute {work.recompute.name} (also in {out}.txt)"
    print(f"\n{what}\n{found.pop('text')}\n", flush=True)
    return found


def _title(report: dict) -> str:
    facts, options = report["machine"], report["options"]
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items() if version)
    backends = ", ".join(f"{op} {row['backend']}" for op, row in report["ops"].items() if op != "platform")
    hand = ", ".join(f"{job}: {kernel}" for job, kernel in report["hand"].items())
    return (
        f"{options['model']} with {options['layers']} layers, {options['micro_batch']} x {options['seq_len']} tokens a "
        f"rank, {options['precision']}, recompute {', '.join(options['recompute'])}, "
        f"on {dist.get_world_size()} x {facts['device']}\n"
        f"torch {facts['torch']}, {packages}\nengine's ops: {backends}\nhand: {hand}"
    )


def _line(result: dict) -> str:
    start = (
        f"{result['pattern']} round {result['round']} {result['peer']} sp {result['sp']} ep {result['ep']} "
        f"recompute {result['recompute']}"
    )
    if "error" in result:
        return f"{start}: {result['error']}"
    held = f", {result['memory_before_bytes'] / 2**30:.1f} GiB in use before" if result["memory_before_bytes"] else ""
    step_ms, first_loss = result["step_ms"]["median"], result["losses"][0]
    return f"{start}: {step_ms:.1f} ms a step, first loss {first_loss:.5f}, {result['whole_s']:.0f} s in all{held}"


def summary(report: dict) -> str:
    """The results as a table, and how the peers compare."""
    rows = [_row(result) for result in report["results"]]
    times = ("ms/step", "min", "max", "fwd+bwd", "optimizer")
    header = ("pattern round peer sp recompute", *times, "tokens/s", "TFLOP/s", "MFU", "GiB", "loss")
    return "\n".join([aligned(header, rows), "", *map(_verdict, report["comparisons"])]).rstrip()


def _verdict(item: dict) -> str:
    line = (
        f"{item['pattern']} round {item['round']}, recompute {item['recompute']}: the engine runs at "
        f"{item['ratio']:.4f} of the hand-assembled speed; first losses differ by {item['loss_difference']:.1e}, "
        f"gradient norms by {item['grad_norm_difference']:.1e}"
    )
    return line if item["agree"] else f"{line}: MORE THAN ROUNDING, not the same computation, the ratio is void"


def _row(result: dict) -> tuple[str, ...]:
    name = " ".join(str(result[key]) for key in ("pattern", "round", "peer", "sp", "recompute"))
    if "error" in result:
        return (name, *("-",) * 9, "out of memory")
    memory = result["peak_memory_bytes"]
    return (
        name,
        *(f"{result['step_ms'][key]:.1f}" for key in ("median", "min", "max")),
        *(f"{result['parts_ms'][key]:.1f}" for key in ("forward_backward", "optimizer")),
        f"{result['tokens_per_s']:.0f}",
        f"{result['tflops']:.1f}",
        shown(result["mfu"], ".1%"),
        shown(memory and memory / 2**30, ".1f"),
        f"{result['losses'][0]:.4f}",
    )

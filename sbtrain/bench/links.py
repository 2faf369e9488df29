"""bench links: what the links between the ranks of torchrun give, and a model of sequence parallelism on more of them.

A ring of messages from every rank to the next gives latency and bandwidth; the exchanges of states are timed as they
are. The table of larger sp is a model from these figures and says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from parallel.mesh import device, start_distributed
from parallel.sequence.choose import EXCHANGES, chained_ms, exchange_ms
from parallel.sequence.zeco import blocks_of
from sbtrain.bench.options import demand_positive
from sbtrain.bench.record import aligned, machine, save, shown
from sbtrain.bench.scaling import Link, fit, halo_s, lasp2_s, ulysses_s, zeco_s
from sbtrain.bench.shapes import model_config
from sbtrain.config.schema import ModelConfig
from sbtrain.config.typed import plain

FILE = "bench_links.json"


@dataclass(frozen=True)
class LinkOptions:
    """Keys of `bench.py links`.

    model: whose states, heads and window. kib: sizes of the ring's messages, in KiB. shard_tokens: tokens of a rank in
    the model's table. sp: its sizes. network: links of the table as LATENCY_US:GB_PER_S; empty takes the measured ones.
    """

    model: str = "7b"
    kib: tuple[int, ...] = (4, 64, 256, 1024, 4096, 16384, 65536)
    shard_tokens: int = 32768
    sp: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 128)
    network: str = ""
    out: str = "runs/bench"


def bench_links(options: LinkOptions, command: str) -> int:
    """Measure, print and save. Returns 0. Raises ValueError for bad options and a world of one rank."""
    demand_positive(options, "kib", "shard_tokens", "sp")
    if len(set(options.kib)) < 2:
        raise ValueError(f"kib={options.kib[0]} is one size; latency and bandwidth need two, for example kib=4,65536")
    model = model_config(options.model, num_layers=2, pattern="LS")
    given = _network(options.network)
    start_distributed()
    if dist.get_world_size() == 1:
        raise ValueError("links are between ranks: start it with torchrun --nproc_per_node 2 or more")
    place, group = device(), dist.group.WORLD
    sizes = [kib * 1024 for kib in options.kib]
    ring = [ring_s(size, place) for size in sizes]
    link = fit(sizes, ring)
    shape = (model.num_kv_heads, model.head_dim, model.head_dim)
    exchanges = {name: exchange_ms(exchange, shape, group, place) for name, exchange in EXCHANGES.items()}
    report = {
        "benchmark": "links",
        "command": command,
        "options": plain(options),
        "machine": machine(place),
        "num_ranks": dist.get_world_size(),
        "ring": [{"bytes": size, "seconds": seconds} for size, seconds in zip(sizes, ring)],
        "link": asdict(link),
        "exchanges_ms": exchanges,
        "modeled_on": asdict(given or link),
        "model": [_modeled(model, options.shard_tokens, sp, given or link) for sp in options.sp if sp > 1],
    }
    if dist.get_rank() == 0:
        path = save(options.out, FILE, report)
        print(f"{summary(report)}\n\n{path}")
    return 0


def ring_s(num_bytes: int, place: torch.device) -> float:
    """Seconds until every rank has a message of the one before it, of the slowest rank. Collective."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def pass_on(sent: torch.Tensor) -> torch.Tensor:
        received = torch.empty_like(sent)
        transfers = [
            dist.P2POp(dist.isend, sent, (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
        return received

    return chained_ms(pass_on, torch.zeros(num_bytes, dtype=torch.uint8, device=place), dist.group.WORLD) / 1e3


def _network(text: str) -> Link | None:
    if not text:
        return None
    try:
        latency_us, gigabytes = map(float, text.split(":"))
    except ValueError:
        latency_us = gigabytes = 0.0
    if latency_us <= 0 or gigabytes <= 0:
        raise ValueError(f"network={text} must be microseconds and GB/s of a link, for example network=8:25")
    return Link(latency_us * 1e-6, gigabytes * 1e9)


def _modeled(model: ModelConfig, shard_tokens: int, sp: int, link: Link) -> dict:
    state = torch.empty(model.num_kv_heads, model.head_dim, model.head_dim, device="meta")
    where = dict(sp=sp, shard_tokens=shard_tokens, link=link)
    seconds = {
        "lasp2": lasp2_s(model, sp=sp, link=link),
        "zeco": zeco_s(model, sp=sp, link=link, num_blocks=blocks_of(state)),
        "halo": halo_s(model, **where),
        "ulysses": ulysses_s(model, **where),
    }
    return {"sp": sp, **{f"{name}_ms": value and value * 1e3 for name, value in seconds.items()}}


def summary(report: dict) -> str:
    """What was measured, then the model's table."""
    measured = aligned(
        ("message, KiB", "us", "GB/s"),
        [
            (f"{row['bytes'] // 1024}", f"{row['seconds'] * 1e6:.1f}", f"{row['bytes'] / row['seconds'] / 1e9:.1f}")
            for row in report["ring"]
        ],
    )
    link, based = report["link"], report["modeled_on"]
    states = ", ".join(f"{name} {ms * 1e3:.1f} us" for name, ms in report["exchanges_ms"].items())
    names = ("lasp2", "zeco", "halo", "ulysses")
    modeled = aligned(
        ("sp", *(f"{name} ms" for name in names)),
        [(f"{row['sp']}", *(shown(row[f"{name}_ms"], ".3f") for name in names)) for row in report["model"]],
    )
    options = report["options"]
    return "\n\n".join(
        [
            f"A ring of {report['num_ranks']} x {report['machine']['device']}, every rank to the next:\n\n{measured}",
            f"latency {link['latency_s'] * 1e6:.1f} us, {link['bytes_per_s'] / 1e9:.1f} GB/s; a state of "
            f"{options['model']}: {states}",
            f"A MODEL, not measured: one layer's exchange forward, {options['shard_tokens']} tokens a rank, links of "
            f"{based['latency_s'] * 1e6:.1f} us and {based['bytes_per_s'] / 1e9:.1f} GB/s:\n\n{modeled}",
        ]
    )

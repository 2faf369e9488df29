"""A model of what sequence parallelism's exchanges cost on more ranks than were measured: latency plus bandwidth.

Times are of one layer's forward pass; its backward pass carries as much again. Nothing here is measured: the links'
figures are (sbtrain.bench.links), and what the model says of more ranks is an extrapolation.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.sequence.ulysses import head_plan, heads_problem
from sbtrain.config.schema import ModelConfig

FP32, BF16 = 4, 2
"""Bytes of an element: states travel in fp32, vectors of tokens in bf16."""


@dataclass(frozen=True)
class Link:
    """Seconds from a send to its arrival, and bytes a second of a rank in one direction."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float) -> float:
        """One message."""
        return self.latency_s + num_bytes / self.bytes_per_s


def fit(sizes: list[int], seconds: list[float]) -> Link:
    """The link whose messages take these times: least squares on relative errors, latency not below zero."""
    weights = [1 / time**2 for time in seconds]
    total = sum(weights)
    mean_size = sum(w * size for w, size in zip(weights, sizes)) / total
    mean_time = sum(w * time for w, time in zip(weights, seconds)) / total
    over = sum(w * (size - mean_size) * (time - mean_time) for w, size, time in zip(weights, sizes, seconds))
    under = sum(w * (size - mean_size) ** 2 for w, size in zip(weights, sizes))
    if over <= 0:
        raise ValueError("larger messages took no longer than small ones: the links were not idle; measure again")
    return Link(max(0.0, mean_time - over / under * mean_size), under / over)


def lasp2_s(model: ModelConfig, *, sp: int, link: Link) -> float:
    """A ring: everyone's state passes every rank."""
    state = model.num_kv_heads * (model.head_dim**2 + model.head_dim) * FP32
    return (sp - 1) * link.seconds(state)


def zeco_s(model: ModelConfig, *, sp: int, link: Link, num_blocks: int) -> float:
    """sp - 1 + blocks rounds of one block."""
    state = model.num_kv_heads * model.head_dim**2 * FP32
    return (sp - 1 + num_blocks) * link.seconds(state / num_blocks)


def halo_s(model: ModelConfig, *, sp: int, shard_tokens: int, link: Link) -> float:
    """The window, from as many ranks as it covers."""
    tokens = min(model.window - 1, (sp - 1) * shard_tokens)
    num_ranks = -(-tokens // shard_tokens)
    return num_ranks * link.latency_s + 2 * tokens * model.num_kv_heads * model.head_dim * BF16 / link.bytes_per_s


def ulysses_s(model: ModelConfig, *, sp: int, shard_tokens: int, link: Link) -> float | None:
    """Four all-to-alls of a shard's q, k, v and o; None where the heads do not allow it."""
    if heads_problem(num_kv_heads=model.num_kv_heads, sp=sp):
        return None
    heads = sum(map(len, head_plan(num_heads=model.num_heads, num_kv_heads=model.num_kv_heads, sp=sp)))
    sent = 2 * heads * model.head_dim * shard_tokens * BF16 * (sp - 1) / sp
    return 4 * (sp - 1) * link.latency_s + sent / link.bytes_per_s

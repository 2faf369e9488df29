"""Prefill and decode: the prompt in chunks, or in shards over sp ranks; then a token at a time from caches.

A layer of kind L remembers a state, one of kind S its window; only layers of kind F grow with the text
(see sbtrain.model.cache). Decoding is one rank's work: each rank that holds the caches can do it alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.sequence.shard import Documents, shard_prompt
from parallel.sequence.tail import tail
from sbtrain.inference.load import Loaded
from sbtrain.inference.sampling import Sampler, Sampling
from sbtrain.inference.text import TextStream
from sbtrain.model.cache import Cache
from sbtrain.model.hybrid import HybridModel

CHUNK_TOKENS = 4096


@dataclass
class Speed:
    """Filled while a text is generated. Decoding counts the tokens after the first, which prefill already gives."""

    num_prompt_tokens: int = 0
    prefill_s: float = 0.0
    num_new_tokens: int = 0
    decode_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second."""
        return self.num_prompt_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """New tokens a second; 0 where there was no step to time."""
        return (self.num_new_tokens - 1) / self.decode_s if self.decode_s else 0.0

    def __str__(self) -> str:
        return (
            f"prompt {self.num_prompt_tokens} tokens, {self.prefill_tokens_per_s:.1f} tokens/s; "
            f"generated {self.num_new_tokens} tokens, {self.decode_tokens_per_s:.1f} tokens/s"
        )


@torch.no_grad()
def advance(model: HybridModel, tokens: Tensor, cache: Cache, *, num_logits: int | None = 1) -> Tensor:
    """Continue the sequence in the cache by tokens int64 [T], on the model's device; the cache moves along.

    Returns the logits after the last num_logits tokens, [num_logits, vocab] in the model's dtype; None: after all.
    """
    num_new = len(tokens)
    positions = torch.arange(cache.num_tokens, cache.num_tokens + num_new, device=tokens.device)
    whole = torch.tensor([0, num_new], dtype=torch.int32, device=tokens.device)
    logits = model(tokens, Documents(whole, positions), cache=cache, num_logits=num_logits)
    cache.num_tokens += num_new
    return logits


def prefill(
    model: HybridModel, tokens: Tensor, *, chunk_tokens: int = CHUNK_TOKENS, keep: str | int = "all"
) -> tuple[Tensor, Cache] | tuple[None, None]:
    """Read a prompt, int64 [T] with T >= 1. Returns the logits [vocab] after it, and the cache.

    One rank reads it in chunks, which bound the memory. Several sp ranks, given the same tokens, read a shard each at
    once; the T % sp tokens that remain, or a prompt of fewer tokens than ranks, are read by each rank that keeps the
    cache. keep: "all" ranks, the "last" one, or one by its sp rank; the others return (None, None). Where it is kept,
    the cache is whole: that of an F layer holds all keys and values of the prompt. Collective.
    Raises ValueError for a rank that does not exist.
    """
    rank, size = model.groups.cp.rank(), model.groups.cp.size()
    keepers, cache = _keepers(keep, size), Cache()
    if 1 < size <= len(tokens):
        logits, tokens = _read_shards(model, tokens, cache, keepers)
    if rank not in keepers:
        return None, None
    for chunk in tokens.split(chunk_tokens) if len(tokens) else ():
        logits = advance(model, chunk, cache)
    return logits[-1], cache


def _keepers(keep: str | int, size: int) -> range:
    ranks = range(size)
    if keep == "all":
        return ranks
    rank = size - 1 if keep == "last" else keep
    if rank not in ranks:
        raise ValueError(f"keep={keep} is not one of all, last and the sp ranks 0 to {size - 1}; choose one of them")
    return range(rank, rank + 1)


@torch.no_grad()
def _read_shards(model: HybridModel, tokens: Tensor, cache: Cache, keepers: range) -> tuple[Tensor, Tensor]:
    """As many tokens as the ranks can share: where they are kept, logits [1, vocab] and the cache; and the rest."""
    group = model.groups.cp
    shard, documents, rest = shard_prompt(tokens, rank=group.rank(), size=group.size(), keepers=keepers)
    logits = model(shard, documents, cache=cache, num_logits=1)
    cache.num_tokens = len(tokens) - len(rest)
    return tail(logits[None], 1, keepers=keepers, group=group)[0], rest


def fork(cache: Cache) -> Cache:
    """A cache that goes its own way from here; what both have seen is shared."""
    return Cache({index: replace(layer) for index, layer in cache.layers.items()}, cache.num_tokens)


def generate_ids(
    model: HybridModel,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: frozenset[int] = frozenset(),
    chunk_tokens: int = CHUNK_TOKENS,
    speed: Speed | None = None,
) -> Iterator[int]:
    """Yield the ids that continue the prompt, up to max_new_tokens; a stop id ends them and is not among them.

    sampling: None is greedy. speed: filled while the ids are made. Of several sp ranks, each reads its part of the
    prompt and then makes all the ids by itself; they must be given the same prompt, and run through it together.
    """
    sampler, speed = Sampler(sampling or Sampling()), speed or Speed()
    device = next(model.parameters()).device
    start = time.perf_counter()
    prompt = torch.tensor(prompt_ids, dtype=torch.int64, device=device)
    logits, cache = prefill(model, prompt, chunk_tokens=chunk_tokens)
    token = sampler.choose(logits)
    speed.num_prompt_tokens, speed.prefill_s = len(prompt_ids), time.perf_counter() - start
    while token not in stop_ids:
        speed.num_new_tokens += 1
        yield token
        if speed.num_new_tokens >= max_new_tokens:
            return
        start = time.perf_counter()
        token = sampler.choose(advance(model, torch.tensor([token], device=device), cache)[-1])
        speed.decode_s += time.perf_counter() - start


def generate_text(loaded: Loaded, prompt: str, **options) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces, whole characters each; options are those of generate_ids.

    Raises ValueError if the prompt has no tokens.
    """
    (prompt_ids,) = loaded.tokenizer.encode_batch([prompt])
    if not prompt_ids:
        raise ValueError("prompt= is empty; give the model something to continue")
    stream = TextStream(loaded.tokenizer)
    for token in generate_ids(loaded.model, prompt_ids, stop_ids=loaded.stop_ids, **options):
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece

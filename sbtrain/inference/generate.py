"""Prefill and decode on one rank: the prompt in chunks, then a token at a time from caches of constant size.

A layer of kind L remembers a state, one of kind S its window; only layers of kind F grow with the text
(see sbtrain.model.cache).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parallel.sequence.shard import Documents
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


def prefill(model: HybridModel, tokens: Tensor, *, chunk_tokens: int = CHUNK_TOKENS) -> tuple[Tensor, Cache]:
    """Read a prompt, int64 [T] with T >= 1, in chunks that bound the memory. Returns logits [vocab] and the cache."""
    cache = Cache()
    for chunk in tokens.split(chunk_tokens):
        logits = advance(model, chunk, cache)
    return logits[-1], cache


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

    sampling: None is greedy. speed: filled while the ids are made.
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

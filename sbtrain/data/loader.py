"""The rows of a training step on one data-parallel rank.

A step consumes samples [n, n + global batch); row r of the step is samples [n + r*micro_batch, ...) and belongs to rank
r % dp_size. What a step reads therefore depends on (seed, stage, n) alone, and a run that continues on another layout
reads the same samples. Nothing is replayed: `start_sample` is found directly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from parallel.sequence.shard import Row
from sbtrain.config.schema import DataConfig, Stage
from sbtrain.data import tokenizer as tokenizers
from sbtrain.data.blend import Blend
from sbtrain.data.pack import Stream, make_row, shuffled
from sbtrain.data.source import Corpus, open_corpus


class Loader:
    """Reads one step ahead in a thread. Build it with `build_loader`."""

    def __init__(
        self,
        streams: Sequence[Stream],
        blend: Blend,
        stage: Stage,
        *,
        identity: str,
        dp_rank: int,
        dp_size: int,
        start_sample: int,
    ):
        self.num_samples = start_sample
        """Samples of the stage consumed so far, by all ranks together: what a checkpoint keeps."""
        self._streams = streams
        self._blend = blend
        self._stage = stage
        self._identity = identity
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: Future[list[Row]] | None = None

    @property
    def samples_per_step(self) -> int:
        """Sequences of the global batch."""
        return self._stage.global_batch_tokens // self._stage.seq_len

    def next_step(self) -> list[Row]:
        """This rank's rows of the next step, each of micro_batch * seq_len tokens.

        Raises ValueError, here in the caller, where a file turns out to be corrupt: every byte of it is compared with
        its checksum before it gets into a row.
        """
        ahead = self._ahead or self._thread.submit(self._read, self.num_samples)
        self._ahead = None
        rows = ahead.result()
        self.num_samples += self.samples_per_step
        self._ahead = self._thread.submit(self._read, self.num_samples)
        return rows

    def origin_of(self, rows: Sequence[int]) -> dict:
        """Where the newest step came from, for people: all of its samples, and the documents of some rows.

        rows: of the global batch. The same on every rank.
        """
        first, per_row = self.num_samples - self.samples_per_step, self._stage.micro_batch
        named = [first + row * per_row + place for row in rows for place in range(per_row)]
        suspects = [self._origin_of_sample(sample) for sample in named]
        return {"first_sample": first, "num_samples": self.samples_per_step, "suspects": suspects}

    def samples_since(self, state: Mapping | None) -> dict:
        """Which samples of the stage were read since a state_dict, over all ranks; None: since its beginning."""
        first = state["num_samples"] if state else 0
        return {"first_sample": first, "num_samples": self.num_samples - first}

    def state_dict(self) -> dict:
        """Everything that resuming needs, the same on every rank and in every layout."""
        return {"num_samples": self.num_samples, "identity": self._identity}

    def load_state_dict(self, state: Mapping) -> None:
        """Continue from a state. Raises ValueError if it belongs to other data, seed, stage or sequence length."""
        if state["identity"] != self._identity:
            raise ValueError(
                "data.sources, their weights, seed or the stage's seq_len changed since the checkpoint, its data order "
                "cannot go on; restore them or start a new run_dir"
            )
        self.num_samples = int(state["num_samples"])
        self._ahead = None

    def close(self) -> None:
        """Stop the thread and close the files. The loader cannot be used afterwards."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        for stream in self._streams:
            stream.corpus.close()

    def unsealed(self) -> list[str]:
        """Corpora without checksums, in which changed tokens would not be noticed."""
        return [stream.corpus.prefix for stream in self._streams if not stream.corpus.is_sealed]

    def _read(self, first: int) -> list[Row]:
        """This rank's rows of the step whose first sample is `first`."""
        micro_batch = self._stage.micro_batch
        num_rows = self.samples_per_step // micro_batch
        return [
            self._read_row(first + row * micro_batch, micro_batch)
            for row in range(self._dp_rank, num_rows, self._dp_size)
        ]

    def _origin_of_sample(self, number: int) -> dict:
        (source,), (index,) = self._blend.assign(np.array([number]))
        stream = self._streams[source]
        documents = stream.documents(int(index), seq_len=self._stage.seq_len)
        return {"sample": number, "source": stream.corpus.name, "index": int(index), "documents": documents}

    def _read_row(self, first: int, micro_batch: int) -> Row:
        sources, indices = self._blend.assign(np.arange(first, first + micro_batch))
        return make_row(
            [
                self._streams[source].sample(int(index), seq_len=self._stage.seq_len)
                for source, index in zip(sources, indices)
            ]
        )


def build_loader(
    data: DataConfig,
    stage: Stage,
    *,
    seed: int,
    stage_name: str,
    dp_rank: int,
    dp_size: int,
    vocab_size: int,
    start_sample: int = 0,
) -> Loader:
    """Open the stage's corpora and return the loader of one data-parallel rank, placed before `start_sample`.

    vocab_size: of the model. Raises ValueError, one line with the key or file and the fix, for a batch that does not
    divide into rows and ranks, a blend that names no source, and whatever `open_corpus` refuses.
    """
    _check_batch(stage, stage_name=stage_name, dp_size=dp_size)
    weights = _weights(data, stage, stage_name=stage_name)
    sha256 = None
    if data.tokenizer:
        tokenizer = tokenizers.load(data.tokenizer)
        tokenizers.check_vocabulary(tokenizer, vocab_size)
        sha256 = tokenizer.sha256
    corpora = [
        open_corpus(data.sources[name].path, name=name, vocab_size=vocab_size, tokenizer_sha256=sha256)
        for name in weights
    ]
    mixed_seed = f"{seed}/{stage_name}"
    return Loader(
        [Stream(corpus, order=shuffled(corpus, seed=mixed_seed)) for corpus in corpora],
        Blend(list(weights.values())),
        stage,
        identity=_identity(corpora, weights, mixed_seed=mixed_seed, seq_len=stage.seq_len),
        dp_rank=dp_rank,
        dp_size=dp_size,
        start_sample=start_sample,
    )


def _check_batch(stage: Stage, *, stage_name: str, dp_size: int) -> None:
    unit_tokens = stage.seq_len * stage.micro_batch * dp_size
    if stage.global_batch_tokens <= 0 or stage.global_batch_tokens % unit_tokens:
        raise ValueError(
            f"stages.{stage_name}.global_batch_tokens={stage.global_batch_tokens} must be a multiple of "
            f"seq_len * micro_batch * dp = {unit_tokens}"
        )


def _weights(data: DataConfig, stage: Stage, *, stage_name: str) -> dict[str, float]:
    """Weight of every source that the stage reads, by name, in the order of data.sources."""
    if unknown := sorted(set(stage.blend) - set(data.sources)):
        known = ", ".join(data.sources) or "none"
        raise ValueError(f"stages.{stage_name}.blend.{unknown[0]} is not one of data.sources ({known})")
    if not data.sources:
        raise ValueError("data.sources is empty; add a corpus made by launch/prepare_data.py")
    weights = {name: stage.blend.get(name, source.weight) for name, source in data.sources.items()}
    if negative := [name for name, weight in weights.items() if not weight >= 0]:
        raise ValueError(f"the weight of data.sources.{negative[0]} is {weights[negative[0]]}; it must be at least 0")
    read = {name: weight for name, weight in weights.items() if weight > 0}
    if not read:
        raise ValueError(f"stages.{stage_name}: every source has weight 0; give data.sources or the blend a weight")
    return read


def _identity(corpora: Sequence[Corpus], weights: Mapping[str, float], *, mixed_seed: str, seq_len: int) -> str:
    """Hash of all that decides which tokens sample i is, short of the tokens themselves."""
    parts = [f"{corpus.name}:{corpus.num_documents}:{corpus.num_tokens}:{weights[corpus.name]!r}" for corpus in corpora]
    return hashlib.sha256("\n".join([mixed_seed, str(seq_len), *parts]).encode()).hexdigest()[:16]

"""Suite bpb: bits per byte of held-out text, by source and by context length."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from parallel.schedule import evaluate_rows
from parallel.sequence.shard import Row
from sbtrain.data.heldout import heldout_rows, scored_bytes
from sbtrain.inference.corpus import check_data, excerpt, is_text
from sbtrain.inference.load import Loaded, Where

_NO_TEXT = "there is no text: give data=PREFIX (of prepare_data's files) or data=FILE.jsonl"


@dataclass(frozen=True)
class BitsOptions:
    """What is read.

    lengths: contexts in tokens; the text is cut anew for each. tokens: of text per source and length, always the first
    of the source; a context that is longer gets one sequence. data: prefixes of prepare_data's files, or text files
    (one of the kinds that prepare_data reads); empty takes the held-out text of the run. text_key: of json lines.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    tokens: int = 16_384
    data: tuple[str, ...] = ()
    text_key: str = "text"

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError("lengths= must name contexts of at least 2 tokens, for example lengths=512,1024")
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")


def check(where: Where, options: BitsOptions) -> None:
    """Raise ValueError where there is no text to read, or a path of data is nothing."""
    if not options.data and where.model:
        raise ValueError(_NO_TEXT)
    for data in options.data:
        check_data(data)


def run(loaded: Loaded, options: BitsOptions) -> dict:
    """{results: [{source, length, bits_per_byte, nats_per_token, tokens, bytes}]}.

    Raises ValueError naming the file that is missing, damaged, of another tokenizer, or without text to score.
    """
    results = []
    for passage in tqdm(passages(loaded, options), desc="bpb", unit="context", disable=None):
        results.append({"source": passage.source, "length": passage.length, **judge(loaded, passage)})
    return {"results": results}


@dataclass(frozen=True)
class Passage:
    """Text to be scored: rows of one source, cut to one length, and the bytes that their labels stand for."""

    source: str
    length: int
    rows: list[Row]
    num_bytes: int


def passages(loaded: Loaded, options: BitsOptions) -> list[Passage]:
    """The text of every source at every length. Raises what `run` raises."""
    found, sizes = [], loaded.tokenizer.token_bytes()
    with tempfile.TemporaryDirectory() as scratch:
        for source, prefix in _prefixes(loaded, options, Path(scratch)).items():
            for length in options.lengths:
                how = dict(seq_len=length, tokens=options.tokens, tokenizer=loaded.tokenizer)
                rows = heldout_rows(prefix, **how, fill=False)
                num_bytes = scored_bytes(rows, sizes)
                if not num_bytes:
                    raise ValueError(
                        f"{prefix}: its documents are too short to score; give documents of two tokens and more"
                    )
                found.append(Passage(source, length, rows, num_bytes))
    return found


def judge(loaded: Loaded, passage: Passage) -> dict:
    """{bits_per_byte, nats_per_token, tokens, bytes} of the model on a passage."""
    alike = groupby(passage.rows, key=lambda row: len(row.tokens))  # the last may be shorter
    sums = [each for _, rows in alike for each in evaluate_rows(loaded.model, loaded.mesh, list(rows))]
    nats, num_tokens = sum(s.loss for s in sums), sum(s.num_tokens for s in sums)
    return {
        "bits_per_byte": nats / math.log(2) / passage.num_bytes,
        "nats_per_token": nats / num_tokens,
        "tokens": num_tokens,
        "bytes": passage.num_bytes,
    }


def table(report: dict) -> str:
    """Sources down, lengths across."""
    results = report["results"]
    sources = list(dict.fromkeys(result["source"] for result in results))
    lengths = list(dict.fromkeys(result["length"] for result in results))
    width = max(len("bits per byte"), *map(len, sources))
    lines = [f"{'bits per byte':{width}}" + "".join(f"{length:>9}" for length in lengths)]
    for source in sources:
        figures = {result["length"]: result["bits_per_byte"] for result in results if result["source"] == source}
        lines.append(f"{source:{width}}" + "".join(f"{figures[length]:>9.4f}" for length in lengths))
    return "\n".join(lines)


def _prefixes(loaded: Loaded, options: BitsOptions, scratch: Path) -> dict[str, str]:
    """Source -> prefix of a tokenized corpus; text files become one in the scratch folder."""
    if not options.data:
        sources = loaded.recipe.data.sources if loaded.recipe else {}
        prefixes = {name: source.valid for name, source in sources.items() if source.valid}
        if not prefixes:
            raise ValueError(_NO_TEXT)
        return prefixes
    prefixes = {}
    how = dict(tokens=max(options.tokens, *options.lengths), text_key=options.text_key)
    for data in options.data:
        name = Path(data).name if Path(data).name not in prefixes else data
        own = scratch / str(len(prefixes))
        prefixes[name] = excerpt(data, own, loaded.tokenizer, **how) if is_text(data) else data
    return prefixes

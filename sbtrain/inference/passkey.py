"""Suite passkey: a number hidden in filler text at some depth, asked for at the end (Landmark Attention, 2023).

Filler, needle and question are those of the published test; filler starts at another sentence and the key is another
one in every sample. Reported are how often greedy generation gives the key, and how sure the model is of it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from sbtrain.data.tokenizer import Tokenizer
from sbtrain.inference.generate import advance, fork, prefill
from sbtrain.inference.load import Loaded

TASK = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
FILLER = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")
NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"
SHADE = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1.5}
"""Behind the figures of the heat map, which are on dark colors too."""

_EXTRA_TOKENS = 2
"""Generated beyond the key's own, for models that write it in more tokens than their tokenizer would."""


@dataclass(frozen=True)
class PasskeyOptions:
    """The grid.

    lengths: prompt and answer together, in tokens (just below). depths: where the key is, 0 beginning, 100 end of the
    filler, in percent. samples: prompts per cell. seed: of keys and filler.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048)
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    samples: int = 4
    seed: int = 0

    def __post_init__(self):
        if not self.lengths:
            raise ValueError("lengths= is empty; write for example lengths=512,1024")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ValueError("depths= must be percentages from 0 to 100, for example depths=0,50,100")
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} must be at least 1")


@dataclass(frozen=True)
class Question:
    """One prompt. prompt_ids: what the model reads. answer_ids: the key as the tokenizer writes it. key: 5 digits."""

    prompt_ids: list[int]
    answer_ids: list[int]
    key: str


def run(loaded: Loaded, options: PasskeyOptions) -> dict:
    """{results: [{length, depth, samples, accuracy, margin, key_nats}]}.

    accuracy: share of the prompts that greedy generation answers with the key. margin: mean over prompts of the
    smallest lead, in nats, of a token of the key over its best rival, given the tokens before it: above 0 exactly where
    greedy decoding writes the key. key_nats: mean negative log-probability of the key.
    Raises ValueError when a length has no room for needle and question.
    """
    results = []
    cells = [(length, depth) for length in options.lengths for depth in options.depths]
    for length, depth in tqdm(cells, desc="passkey", unit="cell", disable=None):
        answers = []
        for sample in range(options.samples):
            draw = random.Random(f"{options.seed}/{length}/{depth}/{sample}")
            question = make_question(loaded.tokenizer, length=length, depth=depth, draw=draw)
            answers.append(ask(loaded, question))
        hits, margins, nats = zip(*answers)
        results.append({
            "length": length, "depth": depth, "samples": options.samples, "accuracy": _mean(hits),
            "margin": _mean(margins), "key_nats": _mean(nats),
        })  # fmt: skip
    return {"results": results}


def make_question(tokenizer: Tokenizer, *, length: int, depth: int, draw: random.Random) -> Question:
    """A prompt that with its answer has at most `length` tokens, a sentence of filler less at most."""
    key = f"{draw.randrange(10_000, 100_000)}"
    task, needle, question = tokenizer.encode_batch([TASK, NEEDLE.format(key=key), QUESTION])
    answer = _answer(tokenizer, question, key)
    room = length - sum(map(len, (task, needle, question, answer)))
    if room < 0:
        raise ValueError(f"lengths: {length} tokens have no room for the question; give at least {length - room}")
    sentences = list(_filler(tokenizer, room, start=draw.randrange(len(FILLER))))
    sentences.insert(round(len(sentences) * depth / 100), needle)
    return Question([*task, *(token for sentence in sentences for token in sentence), *question], answer, key)


def ask(loaded: Loaded, question: Question) -> tuple[bool, float, float]:
    """Whether greedy generation gives the key; margin and negative log-probability of the key, both in nats."""
    model, device = loaded.model, loaded.mesh.device
    first, cache = prefill(model, torch.tensor(question.prompt_ids, device=device))
    answer = torch.tensor(question.answer_ids, device=device)
    rest = advance(model, answer[:-1], fork(cache), num_logits=None) if len(answer) > 1 else first[:0]
    logits = torch.cat([first[None], rest.view(-1, len(first))]).float().log_softmax(-1)
    margin, nats = _lead(logits, answer)
    written, token = [], first.argmax()
    for _ in range(len(answer) + _EXTRA_TOKENS):
        written.append(int(token))
        if written[-1] in loaded.stop_ids:
            break
        token = advance(model, token[None], cache)[-1].argmax()
    text = loaded.tokenizer.decode(written, skip_special=True).strip()
    return text.startswith(question.key) and not text[len(question.key) :][:1].isdigit(), margin, nats


def table(report: dict) -> str:
    """Depths down, lengths across: accuracy and, in parentheses, margin."""
    cells = {(cell["depth"], cell["length"]): cell for cell in report["results"]}
    depths, lengths = _axes(report)
    lines = [f"{'depth':>6}" + "".join(f"{length:>16}" for length in lengths) + "   accuracy (margin in nats)"]
    for depth in depths:
        row = [cells[depth, length] for length in lengths]
        lines.append(f"{depth:>5}%" + "".join(f"{c['accuracy']:>7.2f} ({c['margin']:+6.2f})" for c in row))
    return "\n".join(lines)


def heat_map(report: dict, folder: Path) -> dict[str, Path]:
    """Write accuracy and margin by depth and length as passkey.png; its name and path."""
    depths, lengths = _axes(report)
    cells = {(cell["depth"], cell["length"]): cell for cell in report["results"]}
    figure = Figure(figsize=(4 + 1.6 * len(lengths), 2 + 0.45 * len(depths)), layout="constrained")
    FigureCanvasAgg(figure)
    bound = max(1.0, *(abs(cell["margin"]) for cell in report["results"]))
    panels = (("accuracy", "retrieved (share)", "YlGn", 0, 1), ("margin", "margin (nats)", "RdYlGn", -bound, bound))
    for axes, (name, title, colors, low, high) in zip(figure.subplots(1, 2), panels):
        values = [[cells[depth, length][name] for length in lengths] for depth in depths]
        image = axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axes.set_xlabel("length (tokens)")
        axes.set_ylabel("depth")
        axes.set_title(f"Passkey: {title}", fontsize=10)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, bbox=SHADE)
        figure.colorbar(image, ax=axes)
    figure.savefig(folder / "passkey.png", dpi=120)
    return {"passkey": folder / "passkey.png"}


def _axes(report: dict) -> tuple[list[int], list[int]]:
    return tuple(list(dict.fromkeys(cell[key] for cell in report["results"])) for key in ("depth", "length"))


def _answer(tokenizer: Tokenizer, question: list[int], key: str) -> list[int]:
    """The key as it follows the question; where the tokenizer merges across them, as it stands alone."""
    together, alone = tokenizer.encode_batch([f"{QUESTION} {key}", f" {key}"])
    return together[len(question) :] if together[: len(question)] == question else alone


def _filler(tokenizer: Tokenizer, room: int, *, start: int) -> Iterator[list[int]]:
    """Whole sentences, in turn, that fit into `room` tokens."""
    sentences = tokenizer.encode_batch(FILLER)
    while len(sentence := sentences[start % len(sentences)]) <= room:
        yield sentence
        room, start = room - len(sentence), start + 1


def _lead(log_probabilities: Tensor, answer: Tensor) -> tuple[float, float]:
    """Smallest lead of the answer's tokens over their best rivals, and the negative log-probability of them all."""
    own = log_probabilities.gather(1, answer[:, None])[:, 0]
    rivals = log_probabilities.scatter(1, answer[:, None], -torch.inf).amax(1)
    return float((own - rivals).min()), float(-own.sum())


def _mean(values) -> float:
    return sum(values) / len(values)

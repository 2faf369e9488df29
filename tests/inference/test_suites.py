"""Evaluation suites on a small model: figures against their definitions, files, and refusals of the command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.convert.export import export
from sbtrain.data.prepare import prepare
from sbtrain.inference import bits, passkey
from sbtrain.inference.suites import SUITES
from sharding import global_state
from tiny_model import EOS, MODEL, exact_logits, loaded_model, parallel_logits, write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["héllo world, this is one.", "x", "another document that is longer than a row of the evaluation", "end €"]


class DictReader:
    """A checkpoint in memory."""

    def __init__(self, state):
        self.get = state.__getitem__


@pytest.fixture
def mesh():
    with Mesh.build(Layout()) as mesh:
        yield mesh


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def bits_by_hand(loaded, *, length: int) -> float:
    """Documents end in eos, rows are cut from them back to back, a cut starts a new document, eos is not scored."""
    nats, num_bytes, ids, starts = 0.0, 0, [], []
    for document in loaded.tokenizer.encode_batch(TEXTS):
        starts.append(len(ids))
        ids += [*document, EOS]
    bounds = sorted({*starts, *range(0, len(ids), length), len(ids)})
    for start, stop in zip(bounds, bounds[1:]):
        document = torch.tensor(ids[start : stop + 1] if stop not in starts else ids[start:stop])
        if len(document) < 2:
            continue
        log_p = exact_logits(loaded.config, document[:-1]).log_softmax(-1)
        for position, label in enumerate(document[1:].tolist()):
            if label != EOS:
                nats, num_bytes = nats - float(log_p[position, label]), num_bytes + 1  # a token is a byte
    return nats / math.log(2) / num_bytes


def test_bits_per_byte(mesh, tmp_path, texts):
    loaded = loaded_model(tmp_path / "tokenizer", mesh)
    prepare([texts], tmp_path / "corpus", tokenizer=loaded.tokenizer.folder, progress=False)
    options = bits.BitsOptions(lengths=(16, 64), tokens=1000, data=(str(tmp_path / "corpus"), str(texts)))
    report = bits.run(loaded, options)
    found = {(result["source"], result["length"]): result["bits_per_byte"] for result in report["results"]}
    assert list(found) == [("corpus", 16), ("corpus", 64), ("text.jsonl", 16), ("text.jsonl", 64)]
    for (_, length), value in found.items():
        assert value == pytest.approx(bits_by_hand(loaded, length=length), rel=1e-5)
    lines = bits.table(report).splitlines()
    assert lines[0].split() == ["bits", "per", "byte", "16", "64"] and len(lines) == 3
    assert lines[2].split() == ["text.jsonl", f"{found['text.jsonl', 16]:.4f}", f"{found['text.jsonl', 64]:.4f}"]


def test_only_as_much_text_as_asked_is_read(mesh, tmp_path, texts):
    loaded = loaded_model(tmp_path / "tokenizer", mesh)
    report = bits.run(loaded, bits.BitsOptions(lengths=(16,), tokens=32, data=(str(texts),)))
    assert report["results"][0]["tokens"] < 32


def test_passkey_prompts(mesh, tmp_path):
    tokenizer = loaded_model(tmp_path, mesh).tokenizer
    for length, depth in ((400, 0), (400, 50), (401, 100), (900, 25)):
        question = passkey.make_question(tokenizer, length=length, depth=depth, draw=random.Random(depth))
        text = tokenizer.decode(question.prompt_ids)
        num_tokens = len(question.prompt_ids) + len(question.answer_ids)
        assert length - 30 < num_tokens <= length
        assert text.count(question.key) == 2 and text.endswith("The pass key is")
        assert tokenizer.decode(question.answer_ids) == f" {question.key}"
        filler = [len(part) for part in text[len(passkey.TASK) : -len(passkey.QUESTION)].split(question.key)]
        assert abs(filler[0] / (filler[0] + filler[2]) - depth / 100) < 0.2
    with pytest.raises(ValueError, match="lengths: 100 tokens have no room"):
        passkey.make_question(tokenizer, length=100, depth=0, draw=random.Random(0))


class Parrot(torch.nn.Module):
    """A stand-in for the model: repeats the first digits that it read, but for one where told to be wrong."""

    def __init__(self, tokenizer, groups, *, wrong_digit: int | None, num_digits: int):
        super().__init__()
        self.weight, self.tokens, self.groups = torch.nn.Parameter(torch.zeros(1)), [], groups
        self.wrong_digit, self.num_digits = wrong_digit, num_digits
        self.digits, (self.space,) = tokenizer.encode_batch(["0123456789", " "])

    def forward(self, tokens, documents, cache, num_logits):
        start = int(documents.positions[0])
        self.tokens = self.tokens[:start] + tokens.tolist()
        ends = range(start + 1, len(self.tokens) + 1)
        logits = torch.stack([self._next(self.tokens[:end]) for end in ends])
        return logits if num_logits is None else logits[-num_logits:]

    def _next(self, history):
        read = [token for token in history if token in self.digits]
        num_said = max(0, len(read) - 10)  # the needle has the key twice
        target = self.space
        if len(read) >= 10 and (num_said or history[-1] == self.space) and num_said < self.num_digits:
            target = read[num_said % 5]
            if num_said == self.wrong_digit:
                target = next(digit for digit in self.digits if digit != target)
        return torch.nn.functional.one_hot(torch.tensor(target), 260).float() * 10.0


@pytest.mark.parametrize(
    ("wrong_digit", "num_digits", "accuracy"),
    [(None, 5, 1.0), (3, 5, 0.0), (None, 6, 0.0)],
    ids=["right", "wrong", "longer"],
)
def test_passkey_scores(mesh, tmp_path, wrong_digit, num_digits, accuracy):
    loaded = loaded_model(tmp_path, mesh)
    parrot = Parrot(loaded.tokenizer, mesh.groups, wrong_digit=wrong_digit, num_digits=num_digits)
    loaded = replace(loaded, model=parrot)
    report = passkey.run(loaded, passkey.PasskeyOptions(lengths=(300, 400), depths=(0, 100), samples=2))
    cells = [(cell["length"], cell["depth"]) for cell in report["results"]]
    assert cells == [(300, 0), (300, 100), (400, 0), (400, 100)]
    for cell in report["results"]:
        assert cell["accuracy"] == accuracy
        assert cell["margin"] == pytest.approx(-10.0 if wrong_digit else 10.0)
        surprise = math.log(259 + math.exp(10))  # of a token with logit 0 beside one with 10
        assert cell["key_nats"] == pytest.approx(6 * (surprise - 10) + (10 if wrong_digit else 0), rel=1e-4)
    assert f"{accuracy:.2f}" in passkey.table(report).splitlines()[1]


def test_the_margin_is_that_of_the_model(mesh, tmp_path):
    loaded = loaded_model(tmp_path, mesh)
    question = passkey.make_question(loaded.tokenizer, length=250, depth=50, draw=random.Random(0))
    hit, margin, nats = passkey.ask(loaded, question)
    tokens = torch.tensor(question.prompt_ids + question.answer_ids)
    log_p = parallel_logits(loaded.model, tokens)[len(question.prompt_ids) - 1 : -1].log_softmax(-1)
    own = [float(row[token]) for row, token in zip(log_p, question.answer_ids)]
    rival = [max(float(x) for i, x in enumerate(row) if i != token) for row, token in zip(log_p, question.answer_ids)]
    assert margin == pytest.approx(min(a - b for a, b in zip(own, rival)), abs=1e-3)
    assert nats == pytest.approx(-sum(own), abs=1e-3) and not hit  # random weights


def launch(script: str, arguments: list[str]) -> int:
    return runpy.run_path(str(ROOT / "launch" / f"{script}.py"))["main"](arguments)


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "launch")
    monkeypatch.chdir(tmp_path)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    export(DictReader(global_state(MODEL)), model=MODEL, out="a=b", dtype="fp32", tokenizer_dir=tokenizer)
    return "a=b"  # values are literal, cut at the first =


def test_launch_evaluate_leaves_results(exported, texts, capsys):
    arguments = [f"model={exported}", "suite=bpb,passkey", f"data={texts}", "lengths=256", "tokens=256", "samples=1",
                 "depths=0,100"]  # fmt: skip
    assert launch("evaluate", arguments) == 0
    printed = capsys.readouterr().out
    assert "bits per byte" in printed and "accuracy" in printed
    folder = Path(exported) / "evaluation"
    assert sorted(path.name for path in folder.iterdir()) == ["bpb.json", "passkey.json", "passkey.png"]
    report = json.loads((folder / "bpb.json").read_text())
    assert report["model"] == exported and report["results"][0]["length"] == 256
    assert (folder / "passkey.png").read_bytes()[1:4] == b"PNG"


def test_launch_generate_streams_text(exported, capsys):
    arguments = [f"model={exported}", "prompt=1+1=2", "max_new_tokens=8", "temperature=0.7", "seed=4"]
    assert launch("generate", arguments) == 0
    streamed = capsys.readouterr()
    assert launch("generate", [*arguments, "stream=false"]) == 0
    assert capsys.readouterr().out == streamed.out
    assert "prompt 5 tokens" in streamed.err and "tokens/s" in streamed.err


def on_rank(rank: int, arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of launch/generate.py on one rank."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = launch("generate", arguments)
    return code, out.getvalue(), err.getvalue()


def test_launch_generate_reads_a_prompt_on_several_ranks(exported, run_ranks, capsys, tmp_path):
    arguments = [f"model={tmp_path / exported}", "prompt=a prompt of 23 letters.", "max_new_tokens=8", "temperature=1"]
    assert launch("generate", arguments) == 0
    alone = capsys.readouterr().out
    (code, out, err), *others = run_ranks(3)(on_rank, [*arguments, "sp=3"])
    assert (code, out) == (0, alone) and "prompt 23 tokens" in err
    assert "sp=3, S layers: halo (" in err and "sp=3, L layers: " in err and " (a state to 3 ranks: lasp2 " in err
    assert others == [(0, "", "")] * 2


def test_launch_generate_on_several_ranks_refuses_once(exported, run_ranks, tmp_path):
    full = replace(MODEL, pattern="F")
    export(DictReader(global_state(full)), model=full, out="full", dtype="fp32", tokenizer_dir=tmp_path / "tokenizer")
    for given, message in (
        (["model=nowhere"], "sp=1 does not fit 3 processes; write sp=3, or start sp processes with torchrun"),
        (["model=nowhere", "sp=2"], "sp=2 does not fit 3 processes"),
        (["model=nowhere", "sp=3"], "model=nowhere is not a folder"),
        (
            [f"model={tmp_path / 'full'}", "sp=3"],
            "sp=3 is larger than the 2 key/value heads of a tp rank and no multiple; choose",
        ),
    ):
        (code, out, err), *others = run_ranks(3)(on_rank, ["prompt=x", *given])
        assert (code, out, err.count("\n")) == (2, "", 1) and f"error: {message}" in err
        assert others == [(2, "", "")] * 2


def on_rank_of_folders(rank: int, folders: list[Path]) -> tuple[int, str, str]:
    """The same where each rank sees another folder, as on several hosts."""
    return on_rank(rank, ["prompt=x", "sp=2", f"model={folders[rank]}"])


@pytest.mark.parametrize("lacks", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_one_rank_cannot_read_all_ranks_refuse(exported, run_ranks, tmp_path, lacks):
    """The others are on their way to time their links by then, or at the prompt."""
    damaged = shutil.copytree(tmp_path / exported, tmp_path / "damaged")
    (damaged / lacks).unlink()
    (code, out, err), other = run_ranks(2)(on_rank_of_folders, [tmp_path / exported, damaged])
    assert (code, out, err.count("\n")) == (2, "", 1) and str(damaged) in err
    assert other == (2, "", "")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evaluate", ["model=a=b", "suite=pbb"], "suite=pbb does not exist; choose from bpb, passkey, spiking, lm_"),
        ("evaluate", ["model=a=b", "suite="], "choose from bpb, passkey, spiking, lm_eval"),
        ("evaluate", ["model=a=b", "sample=3"], "sample= is not known here; "),
        ("evaluate", ["model=a=b", "suite=passkey", "depth=3"], "did you mean depths=?"),
        ("evaluate", ["model=a=b", "suite=passkey", "depths=101"], "depths= must be percentages"),
        ("evaluate", ["model=a=b", "suite=passkey", "lengths=64"], "have no room for the question"),
        ("evaluate", ["model=a=b", "lengths=1k"], "lengths=1k is not a whole number"),
        ("evaluate", ["model=a=b", "passkey"], "'passkey' is no option; write key=value"),
        ("evaluate", ["model=a=b"], "there is no text"),
        ("evaluate", ["model=a=b", "data=none"], "data=none is neither a text file nor a prefix"),
        ("evaluate", ["suite=bpb"], "give model=FOLDER"),
        ("evaluate", ["model=none"], "model=none is not a folder"),
        ("evaluate", ["model=a=b", "suite=lm_eval", "include_path=none", "tasks=x"], "pip install|include_path=none"),
        ("evaluate", ["model=a=b", "suite=passkey", "out=text.jsonl/x"], "results cannot be written to text.jsonl/x"),
        ("generate", ["model=a=b"], "prompt= is missing"),
        ("generate", ["model=a=b", "prompt="], "prompt= is empty"),
        ("generate", ["model=a=b", "prompt=x", "prompt=y"], "prompt= is given more than once"),
        ("generate", ["model=a=b", "prompt=x", "stream=yes"], "stream=yes must be true or false"),
        ("generate", ["model=a=b", "prompt=x", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        ("generate", ["model=a=b", "prompt=x", "sp=0"], "sp=0 must be at least 1"),
        ("generate", ["model=a=b", "prompt=x", "sp=3"], "sp=3 does not fit 1 process; write sp=1, or start sp "),
    ],
)
def test_launch_refuses_in_one_line(exported, texts, script, arguments, message, capsys):
    capsys.readouterr()
    assert launch(script, arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error:") and errors.count("\n") == 1
    assert any(part in errors for part in message.split("|"))
    assert not Path(exported, "evaluation").exists()


@pytest.mark.slow
def test_lm_eval_on_an_export_without_network(exported, tmp_path):
    """A task of two questions in a file; answers have one letter, so that the figure is known to be a count of two."""
    pytest.importorskip("lm_eval", reason="the harness is optional (pip install lm-eval==0.4.13)")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    questions = [{"question": "a b", "choices": [" c", " d"], "answer": answer} for answer in (0, 1)]
    (tasks / "tiny.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tasks / "tiny.yaml").write_text(json.dumps({
        "task": "tiny", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tasks / "tiny.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), f"model={exported}", "suite=lm_eval", "tasks=tiny",
               f"include_path={tasks}", "out=results"]  # fmt: skip
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"),
                   "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(Path("results/lm_eval.json").read_text())
    assert report["results"]["tiny"]["acc,none"] == 0.5  # both questions get the same answer, one of them wants it


def test_every_suite_is_described():
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for name, suite in SUITES.items():
        assert f"## {name}" in page
        assert all(f"`{key}" in page for key in suite.options.__dataclass_fields__)

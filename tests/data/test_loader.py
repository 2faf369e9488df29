"""What a step reads depends on (seed, stage, sample) alone: not on dp, not on where the run was interrupted."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from sbtrain.config.schema import DataConfig, Source, Stage
from sbtrain.data.loader import build_loader
from tiny_corpus import VOCAB_SIZE, counted_documents, sha256, write_corpus, write_tokenizer

STAGE = Stage(seq_len=8, tokens=10_000, global_batch_tokens=8 * 12, micro_batch=3)


@pytest.fixture
def data(tmp_path):
    folder = write_tokenizer(tmp_path / "tokenizer")
    digest = sha256(folder / "tokenizer.json")
    a = write_corpus(tmp_path / "a", counted_documents([5, 20, 3, 40]), tokenizer_sha256=digest)
    b = write_corpus(tmp_path / "b", [[200 + n, 230 + n, 0] for n in range(20)], tokenizer_sha256=digest)
    return DataConfig(
        tokenizer=str(folder), sources={"a": Source(path=a, weight=0.75), "b": Source(path=b, weight=0.25)}
    )


@pytest.fixture
def build(data):
    built = []

    def make(**changes):
        arguments = {"seed": 1, "stage_name": "s", "dp_rank": 0, "dp_size": 1, "vocab_size": VOCAB_SIZE} | changes
        stage = arguments.pop("stage", STAGE)
        built.append(build_loader(arguments.pop("data", data), stage, **arguments))
        return built[-1]

    yield make
    for loader in built:
        loader.close()


def same(rows, others):
    """Equal in number, tokens, labels and boundaries."""
    fields = ("tokens", "labels", "cu_seqlens")
    return len(rows) == len(others) and all(
        torch.equal(getattr(row, f), getattr(other, f)) for row, other in zip(rows, others) for f in fields
    )


def test_rows_do_not_depend_on_dp(build):
    alone = build()
    halves = [build(dp_rank=rank, dp_size=2) for rank in range(2)]
    quarters = [build(dp_rank=rank, dp_size=4) for rank in range(4)]
    for _ in range(6):
        rows = alone.next_step()
        assert len(rows) == 4 and all(row.tokens.shape == (24,) for row in rows)
        for ranks in (halves, quarters):
            parts = [loader.next_step() for loader in ranks]
            assert same(rows, [parts[r % len(ranks)][r // len(ranks)] for r in range(4)])


def test_samples_do_not_depend_on_micro_batch(build):
    three, one = build(), build(stage=dataclasses.replace(STAGE, micro_batch=1))
    for _ in range(3):
        left, right = (torch.cat([row.tokens for row in loader.next_step()]) for loader in (three, one))
        assert torch.equal(left, right)


def test_continues_at_any_sample_and_on_another_dp(build):
    whole = build()
    steps = [whole.next_step() for _ in range(5)]
    stopped = build()
    for _ in range(3):
        stopped.next_step()
    state = stopped.state_dict()
    assert state["num_samples"] == stopped.num_samples == 36
    resumed = [build(dp_rank=rank, dp_size=2) for rank in range(2)]
    for loader in resumed:
        loader.next_step()
        loader.load_state_dict(state)
    for step in steps[3:]:
        parts = [loader.next_step() for loader in resumed]
        assert same(step, [parts[r % 2][r // 2] for r in range(4)])
    assert same(steps[3], build(start_sample=36).next_step())


def test_weights_hold_and_blend_overrides_them(build):
    def share_of_b(loader):
        tokens = torch.cat([row.tokens for _ in range(20) for row in loader.next_step()]).view(-1, 8)
        return (tokens >= 200).any(dim=1).float().mean().item()

    assert share_of_b(build()) == pytest.approx(0.25, abs=1 / 240)
    assert share_of_b(build(stage=dataclasses.replace(STAGE, blend={"b": 2.25}))) == pytest.approx(0.75, abs=1 / 240)
    assert share_of_b(build(stage=dataclasses.replace(STAGE, blend={"b": 0.0}))) == 0


def test_seed_and_stage_change_the_order(build):
    first = build().next_step()
    assert same(first, build().next_step())
    assert not same(first, build(seed=2).next_step())
    assert not same(first, build(stage_name="t").next_step())


def test_state_of_other_data_is_refused(build, data):
    state = build().state_dict()
    for changes in ({"seed": 2}, {"stage": dataclasses.replace(STAGE, seq_len=4)}, {"stage_name": "t"}):
        with pytest.raises(ValueError, match="restore them or start a new run_dir"):
            build(**changes).load_state_dict(state)
    build(dp_rank=1, dp_size=2).load_state_dict(state)


def test_corruption_reaches_the_caller_and_the_thread_ends(build, data, tmp_path):
    raw = bytearray((tmp_path / "b.bin").read_bytes())
    raw[2:4] = (VOCAB_SIZE).to_bytes(2, "little")
    (tmp_path / "b.bin").write_bytes(raw)
    loader = build()
    with pytest.raises(ValueError, match=r"b\.bin is corrupt: document 0"):
        for _ in range(20):
            loader.next_step()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_bad_settings_name_the_key(build, data):
    cases = [
        ({"dp_size": 5}, r"stages\.s\.global_batch_tokens=96 must be a multiple of seq_len \* micro_batch \* dp = 120"),
        ({"stage": dataclasses.replace(STAGE, blend={"z": 1.0})}, r"stages\.s\.blend\.z is not one of data\.sources"),
        ({"stage": dataclasses.replace(STAGE, blend={"a": -1.0})}, r"weight of data\.sources\.a is -1\.0"),
        ({"stage": dataclasses.replace(STAGE, blend={"a": 0.0, "b": 0.0})}, "every source has weight 0"),
        ({"data": DataConfig(tokenizer=data.tokenizer)}, r"data\.sources is empty"),
        ({"vocab_size": 100}, r"model\.vocab_size is 100"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            build(**changes)


def test_tokenizer_must_be_the_one_that_made_the_corpus(build, data, tmp_path):
    other = write_tokenizer(tmp_path / "other") / "tokenizer.json"
    other.write_text(other.read_text() + "\n")
    with pytest.raises(ValueError, match=r"a\.json was made with another tokenizer\.json"):
        build(data=dataclasses.replace(data, tokenizer=str(other.parent)))

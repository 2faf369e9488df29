"""Prefill over sequence-parallel ranks: logits, every cache and what is generated next equal one rank's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.layout import Layout, SequenceAlgorithm, SequenceAlgorithms
from parallel.mesh import Mesh
from sbtrain.config.model_schema import FeatureMap, Gate, GLAConfig, MetaConfig, PairConfig
from sbtrain.config.schema import ModelConfig, Precision
from sbtrain.inference.generate import advance, generate_ids, prefill
from sbtrain.inference.sampling import Sampling
from sbtrain.model.cache import Cache
from tiny_model import MODEL, build

ODD_HEADS = dict(num_heads=9, num_kv_heads=3, hidden_size=36, head_dim=4)
TIED = dict(gla=GLAConfig(feature_map=FeatureMap.sigmoid, gate=Gate.tied))
META = MetaConfig(num_tokens=6)
TOLERANCE = 2e-5
NUM_GREEDY = 5

ULYSSES = SequenceAlgorithms(*[SequenceAlgorithm.ulysses] * 3)
OWN = SequenceAlgorithms(S=SequenceAlgorithm.halo, L=SequenceAlgorithm.lasp2)
CASES = [
    (2, ULYSSES, dict(pattern="LS", **ODD_HEADS)),
    (2, OWN, dict(pattern="LS", **ODD_HEADS)),
    (2, ULYSSES, dict(pattern="LF", qk_norm=True, tie_embeddings=True, **ODD_HEADS)),
    (2, OWN, dict(pattern="LS", window=1)),
    (3, ULYSSES, dict(pattern="LS", **ODD_HEADS)),
    (3, OWN, dict(pattern="LF", **ODD_HEADS)),
    (3, ULYSSES, dict(pattern="F", **ODD_HEADS)),
    (4, ULYSSES, dict(pattern="LS")),
    (4, OWN, dict(pattern="LS", **ODD_HEADS)),
    (4, OWN, dict(pattern="LFSS", window=30)),
    (3, replace(OWN, L=SequenceAlgorithm.zeco), dict(pattern="LS", **ODD_HEADS)),
    (2, OWN, dict(pattern="(LS)(LF)", **TIED)),
    (2, ULYSSES, dict(pattern="(LS)(LF)", pair=PairConfig(shared_projections=True), **TIED, **ODD_HEADS)),
    (3, OWN, dict(pattern="(LS)(LF)", meta=META, **TIED, **ODD_HEADS)),
    (2, ULYSSES, dict(pattern="(LS)(LF)", meta=META, **TIED, **ODD_HEADS)),
    (3, replace(OWN, L=SequenceAlgorithm.zeco), dict(pattern="LS", meta=replace(META, in_state=False))),
]
"""sp; algorithms; the model. Its window of 7 is longer than some shards and prompts, 30 than more of them."""
LENGTHS = (1, 2, 3, 4, 5, 8, 13, 29, 48, 53)
"""Of prompts: fewer tokens than ranks, one each, odd ones, several windows."""
FOR_KERNELS = dict(hidden_size=256, head_dim=64, num_heads=6, num_kv_heads=2, ffn_size=384, window=100)


def prompt_of(num_tokens: int) -> Tensor:
    return torch.randint(MODEL.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(num_tokens))


def contents(cache: Cache) -> dict[str, Tensor]:
    """Every tensor of a cache, copied: decoding goes on in it."""
    layers = {
        index: {**vars(layer), **layer.sinks, "sinks": None}.items() for index, layer in sorted(cache.layers.items())
    }
    return {f"{i} {name}": x.cpu().clone() for i, fields in layers.items() for name, x in fields if x is not None}


def greedy(model, logits: Tensor, cache: Cache) -> list[int]:
    written = [int(logits.argmax())]
    while len(written) < NUM_GREEDY:
        written.append(int(advance(model, torch.tensor(written[-1:], device=logits.device), cache)[-1].argmax()))
    return written


def prefilled(
    rank: int,
    layout: Layout,
    config: ModelConfig,
    keep: str | int = "all",
    *,
    lengths: tuple[int, ...] = LENGTHS,
    precision: Precision = Precision.fp32,
) -> list:
    """For each length, where it is kept: (tokens seen, logits and caches, greedy tokens)."""
    found = []
    with Mesh.build(layout) as mesh:
        model = build(config, mesh, precision=precision)
        for num_tokens in lengths:
            logits, cache = prefill(model, prompt_of(num_tokens).to(mesh.device), chunk_tokens=20, keep=keep)
            if logits is not None:
                tensors = {"logits": logits.cpu(), **contents(cache)}
                found.append((cache.num_tokens, tensors, greedy(model, logits, cache)))
            else:
                assert cache is None
    return found


def check_equal(found: list, expected: list, tolerance: float = TOLERANCE) -> None:
    for (num_tokens, tensors, written), whole in zip(found, expected, strict=True):
        assert (num_tokens, written) == (whole[0], whole[2])
        torch.testing.assert_close(tensors, whole[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("sp", "algorithms", "changes"), CASES)
def test_every_rank_is_left_what_one_rank_has(run_ranks, sp, algorithms, changes):
    config = replace(MODEL, **changes)
    expected = prefilled(0, Layout(), config)
    assert [found[0] for found in expected] == [*LENGTHS]
    for found in run_ranks(sp)(prefilled, Layout(sp=sp, sp_algorithm=algorithms), config):
        check_equal(found, expected)


@pytest.mark.parametrize(("keep", "keeper"), [("last", 2), (0, 0), (1, 1)])
@pytest.mark.parametrize("algorithms", [ULYSSES, OWN], ids=["ulysses", "own"])
def test_one_rank_is_left_it_alone(run_ranks, algorithms, keep, keeper):
    config = replace(MODEL, pattern="LFSL", **ODD_HEADS)
    expected = prefilled(0, Layout(), config)
    results = run_ranks(3)(prefilled, Layout(sp=3, sp_algorithm=algorithms), config, keep)
    check_equal(results.pop(keeper), expected)
    assert results == [[]] * 2


def ids_of(rank: int, layout: Layout, sampling: Sampling) -> list[list[int]]:
    with Mesh.build(layout) as mesh:
        model = build(MODEL, mesh)
        return [
            list(generate_ids(model, prompt_of(num_tokens).tolist(), max_new_tokens=6, sampling=sampling))
            for num_tokens in (2, 23)
        ]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=3)], ids=["greedy", "drawn"])
def test_all_ranks_write_what_one_rank_writes(run_ranks, sampling):
    expected = ids_of(0, Layout(), sampling)
    assert run_ranks(3)(ids_of, Layout(sp=3, sp_algorithm=OWN), sampling) == [expected] * 3


def keep_nowhere(rank: int, keep: str | int) -> None:
    with Mesh.build(Layout(sp=2)) as mesh:
        prefill(build(MODEL, mesh), prompt_of(5), keep=keep)


@pytest.mark.parametrize("keep", [2, -1, "first"])
def test_a_rank_that_is_not_there(run_ranks, keep):
    with pytest.raises(ValueError, match=f"keep={keep} is not one of all, last and the sp ranks 0 to 1"):
        run_ranks(2)(keep_nowhere, keep)


def on_gpus(run_ranks, num_ranks: int, *args, **kwargs) -> list:
    return run_ranks(num_ranks, backend="nccl", timeout_s=400.0)(prefilled, *args, **kwargs)


def check_on_gpus(run_ranks, sp: int) -> None:
    """fp32 equals one GPU; bf16, where the kernels run, is as near to fp32 as bf16 on one GPU."""
    for algorithms in (ULYSSES, OWN):
        layout, config = Layout(sp=sp, sp_algorithm=algorithms), replace(MODEL, pattern="LFSL")
        (expected,) = on_gpus(run_ranks, 1, Layout(), config)
        for found in on_gpus(run_ranks, sp, layout, config):
            check_equal(found, expected, tolerance=1e-4)
        config, lengths = replace(MODEL, pattern="LFSL", **FOR_KERNELS), (1030,)
        (((_, whole, _),),) = on_gpus(run_ranks, 1, Layout(), config, lengths=lengths)
        (((_, alone, _),),) = on_gpus(run_ranks, 1, Layout(), config, lengths=lengths, precision=Precision.bf16)
        for ((_, shared, _),) in on_gpus(run_ranks, sp, layout, config, lengths=lengths, precision=Precision.bf16):
            for name, exact in whole.items():
                apart, allowed = (float((x[name].float() - exact).norm() / exact.norm()) for x in (shared, alone))
                assert apart <= 1.5 * allowed + 1e-3, (name, apart, allowed)


@pytest.mark.multigpu(2)
def test_two_gpus_leave_what_one_has(run_ranks):
    check_on_gpus(run_ranks, 2)


@pytest.mark.multigpu(4)
def test_four_gpus_leave_what_one_has(run_ranks):
    check_on_gpus(run_ranks, 4)

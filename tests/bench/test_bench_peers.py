"""The hand-assembled peer: its parts by themselves, and that it and the engine are one computation."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from sbtrain.bench.hand_kernels import chunked_gla
from sbtrain.bench.hand_optimizer import MasterAdamW
from sbtrain.bench.peers import PEERS, Work
from sbtrain.bench.shapes import TINY, model_config
from sbtrain.bench.train import compare, file_name
from sbtrain.bench.weights import draw
from sbtrain.config.schema import OptimConfig, Precision, Recompute

CPU = torch.device("cpu")


def run(peer: str, work: Work, *, num_steps: int = 3):
    """Losses and gradient norms of the first steps."""
    built = PEERS[peer](work)
    try:
        return [tuple(map(float, built.step(lambda part: None))) for _ in range(num_steps)]
    finally:
        built.close()


def work(model, precision=Precision.fp32, recompute=Recompute.none) -> Work:
    return Work(model, precision, recompute, micro_batch=2, seq_len=37)


@pytest.mark.parametrize(
    "changes",
    [
        dict(pattern="LSF", num_layers=3),
        dict(pattern="SL", qk_norm=True, tie_embeddings=True, qkv_bias=False),
        dict(pattern="F", num_kv_heads=4, window=50),
    ],
    ids=str,
)
def test_engine_and_hand_take_the_same_steps(changes):
    """Forward, backward, clipping and AdamW: an implementation that shares no code with the engine's."""
    job = work(replace(TINY, **changes))
    engine, hand = torch.tensor(run("engine", job)).double(), torch.tensor(run("hand", job)).double()
    assert engine[0, 0] > 3 and engine[-1, 0] < engine[0, 0]
    torch.testing.assert_close(engine, hand, rtol=1e-5, atol=0)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
def test_recomputation_changes_nothing(recompute):
    model = replace(TINY, pattern="LS")
    plain, again = (run("hand", work(model, recompute=mode), num_steps=2) for mode in (Recompute.none, recompute))
    torch.testing.assert_close(torch.tensor(again), torch.tensor(plain), rtol=1e-6, atol=0)


def test_bf16_agrees_within_its_rounding():
    job = work(replace(TINY, pattern="LS"), precision=Precision.bf16)
    (engine, engine_norm), (hand, hand_norm) = run("engine", job, num_steps=1)[0], run("hand", job, num_steps=1)[0]
    assert engine == pytest.approx(hand, rel=2e-3)
    assert engine_norm == pytest.approx(hand_norm, rel=3e-2)


def test_another_model_is_found_out():
    """A window that is off by one key: the comparison must call it void."""
    job = work(replace(TINY, pattern="LS"))
    wrong = replace(job, model=replace(job.model, window=job.model.window - 1))
    sides = [run("engine", job, num_steps=1)[0], run("hand", job, num_steps=1)[0], run("hand", wrong, num_steps=1)[0]]
    engine, hand, off = ({"losses": [a], "grad_norms": [b], "step_ms": {"median": 2.0}} for a, b in sides)
    assert compare(engine, hand, Precision.fp32)["agree"]
    assert not compare(engine, off, Precision.fp32)["agree"]
    assert compare(engine, {"error": "out of memory"}, Precision.fp32) is None


def test_chunked_gla_is_the_recurrence():
    """More tokens than a chunk, not a multiple of it; the recurrence token by token in float64."""
    q, k, v = (torch.randn(2, 37, 3, 8, dtype=torch.float64) for _ in range(3))
    log_decay = torch.nn.functional.logsigmoid(torch.randn(2, 37, 3, 8, dtype=torch.float64))
    state, outputs = torch.zeros(2, 3, 8, 8, dtype=torch.float64), []
    for t in range(37):
        state = log_decay[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / 8**0.5)
    torch.testing.assert_close(chunked_gla(q, k, v, log_decay), torch.stack(outputs, 1), rtol=1e-5, atol=1e-5)


def test_master_weights_keep_what_bf16_cannot():
    """200 steps of 1e-4 on a weight of 1, each less than bf16 resolves; and clipping to norm 1."""
    weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], optim=OptimConfig(weight_decay=0.0), lr=1e-4)
    for _ in range(200):
        (3 * weight.sum()).backward()
        assert weight.grad is None, "the bf16 gradient stays in memory"
        norm = optimizer.step()
    assert norm == pytest.approx(6.0)  # of four gradients of 3
    assert optimizer.masters[0].grad.norm() == pytest.approx(1.0, rel=1e-4)
    assert optimizer.masters[0].dtype == torch.float32
    torch.testing.assert_close(optimizer.masters[0], torch.full((2, 2), 0.98), rtol=1e-4, atol=0)
    assert torch.equal(weight, optimizer.masters[0].bfloat16())


def test_draws_repeat_and_differ_by_name():
    shape = torch.Size((4, 16))
    assert torch.equal(draw("a.weight", shape, CPU), draw("a.weight", shape, CPU))
    assert not torch.equal(draw("a.weight", shape, CPU), draw("b.weight", shape, CPU))


@pytest.mark.parametrize("peer", PEERS)
def test_closing_a_peer_frees_its_weights(peer):
    """The next one needs the memory."""
    built = PEERS[peer](work(replace(TINY, pattern="LS")))
    built.step(lambda name: None)
    module = built.model if peer == "hand" else built.engine.model
    watched = [weakref.ref(parameter) for parameter in module.parameters()]
    del module
    built.close()
    gc.collect()
    assert not [ref for ref in watched if ref() is not None]


def test_model_names():
    assert model_config("7b", num_layers=8, pattern="LS").hidden_size == 3584
    assert model_config("7b_cpt", num_layers=4, pattern="F").num_layers == 4
    with pytest.raises(ValueError, match="model=8b is not known; choose from: tiny, 76b_cpt, 7b_cpt"):
        model_config("8b", num_layers=8, pattern="LS")
    with pytest.raises(ValueError, match="model.pattern 'LSF'"):
        model_config("tiny", num_layers=4, pattern="LSF")


def test_profiles_have_plain_and_different_names():
    patterns = ("(LS) x 2 F:m", "LS x 2 F:m", "(LS):m(LF)", "LS:m(LF)", "L S", "(LF):m")
    names = [file_name(pattern) for pattern in patterns]
    assert names[:3] == ["L_Sx2F-m", "LSx2F-m", "L_S-mL_F"]
    assert len(set(names)) == len(names) and all(name.replace("-", "").isidentifier() for name in names)

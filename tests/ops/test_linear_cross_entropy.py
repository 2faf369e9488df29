"""ops.linear_cross_entropy against a dense float64 cross-entropy, alone and with the vocabulary split over ranks."""

import pytest
import torch
import torch.distributed as dist

import ops
from op_oracles import assert_same
from ops.linear_cross_entropy import reference

NUM_TOKENS, SIZE, VOCAB = 37, 6, 24


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference.Arithmetic, "chunk_tokens", lambda self, weight: 8)


def problem(dtype=torch.float64, num_labels=20):
    """hidden, weight, labels (some ignored), loss weights; the same numbers on every call."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(NUM_TOKENS, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, num_labels, (NUM_TOKENS,), generator=generator)
    labels[[0, 5, 36]] = -100
    return hidden, weight, labels, torch.rand(NUM_TOKENS, generator=generator, dtype=torch.float64)


def dense(hidden, weight, labels, loss_weights, valid_vocab, upstream):
    """losses, gradient of hidden, gradient of weight."""
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.T
    if valid_vocab is not None:
        logits = torch.cat([logits[:, :valid_vocab], logits[:, valid_vocab:] * 0 - 1e9], 1)
    loss = -logits.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0] * (labels != -100)
    if loss_weights is not None:
        loss = loss * loss_weights
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (hidden, weight))]


def ours(hidden, weight, labels, loss_weights, valid_vocab, upstream, group=None):
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    loss = ops.linear_cross_entropy(
        hidden, weight, labels, loss_weights=loss_weights, valid_vocab=valid_vocab, group=group
    )
    (loss * upstream).sum().backward()
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("upstream", ["scalar", "tokens"])
@pytest.mark.parametrize("valid_vocab", [None, 20])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_dense(small_chunks, weighted, valid_vocab, upstream):
    hidden, weight, labels, loss_weights = problem()
    loss_weights = loss_weights if weighted else None
    upstream = torch.tensor(0.3) if upstream == "scalar" else torch.rand(NUM_TOKENS)
    case = (hidden, weight, labels, loss_weights, valid_vocab, upstream)
    assert_same(ours(*case), dense(*case), 1e-12)


def test_a_second_backward_pass_finds_the_same(small_chunks):
    hidden, weight, labels, _ = problem()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = ops.linear_cross_entropy(*leaves, labels).sum() * 0.3
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert_same(second, first, 1e-12)
    assert_same(first, dense(hidden.detach(), weight.detach(), labels, None, None, 0.3)[1:], 1e-12)


def test_padding_gets_no_probability_and_no_gradient():
    hidden, weight, labels, _ = problem()
    weight[20:] = 100.0
    _, _, grad = ours(hidden, weight, labels, None, 20, torch.tensor(1.0))
    assert not grad[20:].any()
    assert grad[:20].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_keeps_losses_in_fp32(small_chunks, dtype, tolerance):
    hidden, weight, labels, _ = problem(dtype)
    actual = ours(hidden, weight, labels, None, None, torch.tensor(1.0))
    assert [x.dtype for x in actual] == [torch.float32, dtype, dtype]
    assert_same(actual, dense(hidden, weight, labels, None, None, 1.0), tolerance)


def test_only_asked_gradients_are_made():
    hidden, weight, labels, _ = problem()
    weight.requires_grad_()
    ops.linear_cross_entropy(hidden, weight, labels).sum().backward()
    assert weight.grad is not None
    assert hidden.grad is None
    with torch.no_grad():
        assert not ops.linear_cross_entropy(hidden, weight, labels).requires_grad


def test_labels_outside_the_vocabulary_are_refused():
    hidden, weight, labels, _ = problem()
    labels[1] = 20
    with pytest.raises(ValueError, match="label 20 is outside the vocabulary of 20"):
        ops.linear_cross_entropy(hidden, weight, labels, valid_vocab=20)


class Buffer:
    """ops.gradient_buffer.GradientBuffer over unwritten memory."""

    def __init__(self, weight, scale):
        self.total = torch.full_like(weight, torch.nan).detach()
        self.scale, self.written, self.calls = scale, False, []

    def begin(self):
        self.calls.append("begin")
        held, self.written = self.written, True
        return held

    def finish(self):
        self.calls.append("finish")


def with_buffer(buffer, hidden, weight, labels, **options):
    return ops.linear_cross_entropy(hidden, weight, labels, weight_grad=buffer, **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_buffer_sums_the_gradients_of_micro_batches(small_chunks, weighted, interleaved):
    hidden, weight, labels, loss_weights = problem()
    options = dict(loss_weights=loss_weights) if weighted else {}
    buffer, weight = Buffer(weight, 0.3), weight.requires_grad_()
    inputs = [(hidden * sign).requires_grad_() for sign in (1, -1, 2)]
    sums = []
    for x in inputs:
        sums.append(with_buffer(buffer, x, weight, labels, valid_vocab=20, **options).sum() * 0.3)
        if not interleaved:
            sums.pop().backward()
    for loss in sums:
        loss.backward()
    assert weight.grad is None
    assert sorted(buffer.calls) == ["begin"] * 3 + ["finish"] * 3
    expected = [dense(x, weight, labels, loss_weights if weighted else None, 20, 0.3) for x in inputs]
    assert_same([x.grad for x in inputs], [grad_hidden for _, grad_hidden, _ in expected], 1e-12)
    assert_same([buffer.total], [sum(grad_weight for *_, grad_weight in expected)], 1e-12)


def test_a_buffer_and_autograd_share_a_tied_weight(small_chunks):
    _, weight, labels, _ = problem()
    buffer, tokens = Buffer(weight, 1.0), labels.clamp(min=0).flip(0)
    weight.requires_grad_()
    with_buffer(buffer, weight[tokens], weight, labels).sum().backward()
    whole = weight.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(whole[tokens] @ whole.T, labels, reduction="sum")
    assert_same([buffer.total + weight.grad], torch.autograd.grad(loss, whole), 1e-12)


def test_a_buffer_of_fp32_is_rounded_nowhere(small_chunks):
    hidden, weight, labels, _ = problem(torch.bfloat16)
    buffer = Buffer(weight.float(), 1 / 3)
    (with_buffer(buffer, hidden.requires_grad_(), weight.requires_grad_(), labels).sum() / 3).backward()
    assert_same([buffer.total], dense(hidden.detach(), weight.detach(), labels, None, None, 1 / 3)[2:], 1e-6)


def test_a_buffer_without_tokens_is_zeroed_once():
    hidden, weight, labels, _ = problem()
    buffer = Buffer(weight, 1.0)
    with_buffer(buffer, hidden[:0].requires_grad_(), weight.requires_grad_(), labels[:0]).sum().backward()
    assert not buffer.total.any()


def test_a_buffer_is_left_alone_where_no_gradient_or_only_one_is_wanted():
    hidden, weight, labels, _ = problem()
    buffer = Buffer(weight, 1.0)
    with_buffer(buffer, hidden, weight.requires_grad_(), labels).sum().backward()
    assert_same([weight.grad], dense(hidden, weight, labels, None, None, 1.0)[2:], 1e-12)
    with_buffer(buffer, hidden.requires_grad_(), weight.detach(), labels).sum().backward()
    with torch.no_grad():
        with_buffer(buffer, hidden, weight, labels)
    assert buffer.calls == [] and buffer.total.isnan().all()


@pytest.mark.parametrize("upstream", [0.4, torch.linspace(0.2, 0.4, NUM_TOKENS)], ids=["another", "unequal"])
def test_a_buffer_refuses_another_gradient_than_promised(upstream):
    hidden, weight, labels, _ = problem()
    loss = with_buffer(Buffer(weight, 0.3), hidden.requires_grad_(), weight.requires_grad_(), labels)
    with pytest.raises(RuntimeError, match="not weight_grad.scale = 0.3"):
        (loss * upstream).sum().backward()


def test_a_buffer_refuses_a_second_backward_pass():
    hidden, weight, labels, _ = problem()
    loss = with_buffer(Buffer(weight, 1.0), hidden.requires_grad_(), weight.requires_grad_(), labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="allows one backward pass"):
        loss.backward()


def test_a_buffer_that_does_not_fit_is_refused():
    hidden, weight, labels, _ = problem()
    with pytest.raises(ValueError, match="weight_grad.total must be contiguous torch.float64"):
        with_buffer(Buffer(weight.float(), 1.0), hidden, weight, labels)


def split_case(rank, valid_vocab, per_token, buffered):
    hidden, weight, labels, loss_weights = problem(num_labels=valid_vocab or VOCAB)
    upstream = torch.linspace(0, 1, NUM_TOKENS) if per_token else torch.tensor(1.0)
    part = slice(rank * VOCAB // 2, (rank + 1) * VOCAB // 2)
    case = (hidden, weight[part], labels, loss_weights, valid_vocab, upstream)
    if not buffered:
        return ours(*case, group=dist.group.WORLD)
    options = dict(loss_weights=loss_weights, valid_vocab=valid_vocab, group=dist.group.WORLD)
    buffer = Buffer(weight[part], 1.0)
    hidden.requires_grad_()
    loss = with_buffer(buffer, hidden, weight[part].requires_grad_(), labels, **options)
    loss.sum().backward()
    return [loss.detach(), hidden.grad, buffer.total]


@pytest.mark.parametrize(  # 10: rank 1 has padding only
    "valid_vocab, per_token, buffered", [(None, False, False), (20, True, False), (10, False, False), (20, False, True)]
)
def test_two_ranks_equal_one(run_ranks, valid_vocab, per_token, buffered):
    hidden, weight, labels, loss_weights = problem(num_labels=valid_vocab or VOCAB)
    upstream = torch.linspace(0, 1, NUM_TOKENS) if per_token else torch.tensor(1.0)
    results = run_ranks(2)(split_case, valid_vocab, per_token, buffered)
    expected = dense(hidden, weight, labels, loss_weights, valid_vocab, upstream)
    for loss, grad_hidden, _ in results:
        assert_same([loss, grad_hidden], expected[:2], 1e-12)
    assert_same([torch.cat([grad for _, _, grad in results])], expected[2:], 1e-12)

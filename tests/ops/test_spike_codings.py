"""Spike codings: every legal count comes back in either order of bits, in as many steps as the report says; events."""

from __future__ import annotations

import re

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops
from ops.spike_encode.steps import COUNTED, ENCODINGS, MOST_UNITS, SIGNED
from ops.spike_linear import events
from ops.spike_linear.events import spike_linear_events

ORDERS = pytest.mark.parametrize("lsb_first", [False, True], ids=["msb first", "lsb first"])
EACH = pytest.mark.parametrize("encoding", ENCODINGS)


def legal(encoding: str, num_steps: int) -> tuple[int, int]:
    """Smallest and largest count that so many steps hold; int32's where those are beyond."""
    if encoding == "twos_complement":
        low, high = -(2 ** (num_steps - 1)), 2 ** (num_steps - 1) - 1
    else:
        high = num_steps if encoding in COUNTED else 2**num_steps - 1
        low = -high if encoding in SIGNED else 0
    return max(low, -(2**31)), min(high, 2**31 - 1)


def counts(low: int, high: int, *, shape=(3, 37)) -> torch.Tensor:
    """Random counts of a range, its ends and what is near 0 among them."""
    found = torch.randint(low, high + 1, shape)
    ends = torch.tensor([low, high, 0, 1, -1, low + 1, high - 1]).clamp(low, high)
    found.view(-1)[: len(ends)] = ends
    return found


@ORDERS
@EACH
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 8, 9, 16, 31, 32, 33, 63])
def test_every_legal_count_comes_back(encoding, lsb_first, num_steps):
    low, high = legal(encoding, num_steps)
    for dtype in (torch.int64, torch.int32):
        count = counts(low, high).to(dtype)
        spikes = ops.spike_encode(count, encoding=encoding, num_steps=num_steps, lsb_first=lsb_first)
        assert spikes.shape == (num_steps, 3, 37) and spikes.dtype == torch.float32
        known = {0.0, 1.0} if encoding in ("binary", "bitwise", "twos_complement") else {-1.0, 0.0, 1.0}
        assert set(spikes.unique().tolist()) <= known
        back = ops.spike_decode(spikes, encoding=encoding, lsb_first=lsb_first)
        assert back.dtype == torch.int32 and torch.equal(back, count.int())


@ORDERS
@EACH
@pytest.mark.parametrize("largest", [0, 1, 6, 40, 1000, 2**31 - 1])
def test_counts_come_back_from_as_many_steps_as_they_need(encoding, lsb_first, largest):
    largest = min(largest, 300) if encoding in COUNTED else largest
    count = counts(-largest if encoding in SIGNED else 0, largest)
    spikes = ops.spike_encode(count, encoding=encoding, lsb_first=lsb_first)
    assert torch.equal(ops.spike_decode(spikes, encoding=encoding, lsb_first=lsb_first), count.int())


@EACH
def test_bits_in_the_other_order_are_the_same_steps_backwards(encoding):
    count = counts(0, 100)
    first, last = (ops.spike_encode(count, encoding=encoding, lsb_first=order) for order in (False, True))
    assert torch.equal(last, first if encoding in COUNTED else first.flip(0))


@pytest.mark.parametrize("largest, bits", [(0, 1), (1, 1), (7, 3), (8, 4), (127, 7), (128, 8), (255, 8), (256, 9)])
@pytest.mark.parametrize("sign", [1, -1])
def test_steps_without_being_told(largest, bits, sign):
    count = torch.tensor([0, sign * largest])
    steps = {name: len(ops.spike_encode(count, encoding=name)) for name in SIGNED}
    assert steps == {"ternary": largest, "bidirectional": bits, "twos_complement": bits + 1}
    if sign > 0:
        assert len(ops.spike_encode(count, encoding="binary")) == largest
        assert len(ops.spike_encode(count, encoding="bitwise")) == bits


@pytest.mark.parametrize(
    "encoding, count, num_steps, expected",
    [
        ("bitwise", 6, None, [0, 1, 1]),
        ("bidirectional", -6, 4, [0, -1, -1, 0]),
        ("twos_complement", -5, 4, [1, 1, 0, 1]),
        ("twos_complement", -5, 6, [1, 1, 0, 1, 1, 1]),
        ("twos_complement", -8, 4, [0, 0, 0, 1]),
        ("binary", 2, 4, [1, 1, 0, 0]),
    ],
)
def test_least_significant_bit_first(encoding, count, num_steps, expected):
    spikes = ops.spike_encode(torch.tensor([count]), encoding=encoding, num_steps=num_steps, lsb_first=True)
    assert spikes[:, 0].tolist() == expected
    assert ops.spike_decode(spikes, encoding=encoding, lsb_first=True).item() == count


@EACH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_counts_and_spikes_of_any_dtype(encoding, dtype):
    low = -7 if encoding in SIGNED and dtype != torch.uint8 else 0
    count = torch.randint(low, 8, (50,)).to(dtype)
    spikes = ops.spike_encode(count, encoding=encoding)
    for kind in (torch.float64, torch.bfloat16, torch.int8, torch.bool):
        if kind != torch.bool or spikes.min() >= 0:
            assert torch.equal(ops.spike_decode(spikes.to(kind), encoding=encoding), count.int())


@EACH
def test_empty_and_all_zero(encoding):
    for count in (torch.zeros(0, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)):
        spikes = ops.spike_encode(count, encoding=encoding)
        assert len(spikes) == {"bitwise": 1, "bidirectional": 1, "twos_complement": 2}.get(encoding, 0)
        assert torch.equal(ops.spike_decode(spikes, encoding=encoding), count)
    single = ops.spike_encode(torch.tensor(5), encoding=encoding)
    assert single.dim() == 1 and ops.spike_decode(single, encoding=encoding).item() == 5


def refuses(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)


@EACH
@pytest.mark.parametrize("num_steps", [1, 3, 8])
def test_one_more_than_the_steps_hold(encoding, num_steps):
    low, high = legal(encoding, num_steps)
    options = {"encoding": encoding, "num_steps": num_steps}
    message = f"num_steps={num_steps} cannot hold a count of {high + 1} in {encoding}; use at least {num_steps + 1}"
    refuses(message, ops.spike_encode, torch.tensor([0, high + 1]), **options)
    if encoding in SIGNED:
        refuses(f"a count of {low - 1} in", ops.spike_encode, torch.tensor([low - 1, high]), **options)
    else:
        refuses("no negative counts, got -1; use one of ternary", ops.spike_encode, torch.tensor([-1, 1]), **options)


def test_counts_that_are_none():
    refuses("count must be integers, got torch.float32", ops.spike_encode, torch.ones(3), encoding="ternary")
    refuses("count must be integers, got torch.bool", ops.spike_encode, torch.ones(3).bool(), encoding="ternary")
    for count in (2**31, -(2**31) - 1):
        refuses(f"fit into int32, got {count}", ops.spike_encode, torch.tensor([count, 0]), encoding="bidirectional")
    refuses("at most 63 steps", ops.spike_encode, torch.tensor([3]), encoding="bitwise", num_steps=64)


@pytest.mark.parametrize("encoding", ["binary", "bitwise"])
@pytest.mark.parametrize("kind", [numpy.int64, numpy.uint8, numpy.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_steps_are_whole_numbers_of_any_kind(encoding, kind):
    assert len(ops.spike_encode(torch.tensor([3]), encoding=encoding, num_steps=kind(60))) == 60
    for none in (60.0, "60", numpy.float64(60), [60]):
        message = re.escape(f"num_steps={none!r} must be a whole number")
        refuses(message, ops.spike_encode, torch.tensor([3]), encoding=encoding, num_steps=none)


def test_a_step_for_each_of_many_units_has_to_be_asked_for():
    for encoding, count in (("binary", 2**31 - 1), ("ternary", -(2**31)), ("binary", MOST_UNITS + 1)):
        size = abs(count)
        message = (
            f"^encoding={encoding}: .* {size}, .*use encoding='bitwise' or 'bidirectional', or give num_steps={size}"
        )
        refuses(message, ops.spike_encode, torch.tensor([count]), encoding=encoding)
    assert len(ops.spike_encode(torch.tensor([MOST_UNITS]), encoding="binary")) == MOST_UNITS
    count, num_steps = torch.tensor([MOST_UNITS + 1]), MOST_UNITS + 2
    assert len(ops.spike_encode(count, encoding="binary", num_steps=num_steps)) == num_steps


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that operations have made."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_bytes = max(self.num_bytes, result.nbytes)
        return result


@pytest.mark.parametrize("encoding", COUNTED)
def test_nothing_on_the_way_to_spikes_of_units_is_larger_than_they_are(encoding):
    with Largest() as largest:
        spikes = ops.spike_encode(torch.full((50,), 1000), encoding=encoding)
    assert largest.num_bytes == spikes.nbytes == 4 * 50 * 1000


@EACH
def test_spikes_that_the_coding_does_not_have(encoding):
    signed = encoding in ("ternary", "bidirectional")
    for spike in (2.0, 0.5, float("nan"), float("inf"), *(() if signed else (-1.0,))):
        spikes = torch.tensor([[0.0, 1.0], [spike, 0.0]])
        names = "-1, 0 and 1" if signed else "0 and 1"
        refuses(f"spikes of encoding={encoding} must be {names}", ops.spike_decode, spikes, encoding=encoding)
    for kind, spike in ((torch.uint8, 255), (torch.int16, 255), (torch.uint64, 2**64 - 1), (torch.complex64, 1 + 1j)):
        spikes = torch.tensor([[spike], [1]], dtype=kind)  # the unsigned ones have the bits of a signed -1
        refuses(f"spikes of encoding={encoding} must be", ops.spike_decode, spikes, encoding=encoding)
    refuses("no such encoding", ops.spike_decode, torch.zeros(2, 2), encoding="morse")
    refuses("spikes must be", ops.spike_decode, torch.tensor(1.0), encoding=encoding)


def test_sums_that_int32_does_not_hold():
    for encoding, num_steps in (("bitwise", 32), ("bidirectional", 32), ("bitwise", 63)):
        refuses("int32 does not hold", ops.spike_decode, torch.ones(num_steps, 1), encoding=encoding)
    refuses("at most 63 steps", ops.spike_decode, torch.ones(64, 1), encoding="bitwise")
    assert ops.spike_decode(torch.ones(40, 1), encoding="twos_complement").item() == -1


@ORDERS
@EACH
@pytest.mark.parametrize("group", [None, 8, 24])
def test_events_add_up_to_the_product_of_counts(encoding, lsb_first, group, monkeypatch):
    monkeypatch.setattr(events, "ADDED_NUMBERS", 50)
    for shape in ((2, 3, 24), (24,), (0, 24)):
        count = torch.randint(-40 if encoding in SIGNED else 0, 41, shape, dtype=torch.int32)
        weight = torch.randint(-128, 128, (7, 24), dtype=torch.int8)
        found = spike_linear_events(count, weight, encoding=encoding, group=group, lsb_first=lsb_first)
        if group is None:
            assert torch.equal(found, count.long() @ weight.long().T)
        else:
            counted, weights = count.long().unflatten(-1, (-1, group)), weight.long().unflatten(-1, (-1, group))
            assert torch.equal(found, torch.einsum("...gd,fgd->...fg", counted, weights))


def test_events_and_spike_linear_compute_the_same():
    """Counts of heavy tails beyond int8, group scales; in float64, where the products are exact as well."""
    x = torch.randn(6, 32, dtype=torch.float64) * torch.randn(6, 32, dtype=torch.float64).exp()
    x[0, 0] = 1000.0
    weight = torch.randint(-127, 128, (5, 32), dtype=torch.int8)
    scale = 0.01 + torch.rand(5, 4, 1, dtype=torch.float64)
    count, threshold = ops.spike_count(x, k=9.0)
    assert count.max() > 127
    sums = spike_linear_events(count, weight, encoding="bidirectional", group=8)
    stored = (weight.double().unflatten(1, (4, 8)) * scale).flatten(1)
    expected = ops.spike_linear(x, stored, k=9.0)
    torch.testing.assert_close(threshold * (sums * scale[..., 0]).sum(-1), expected, rtol=1e-12, atol=1e-12)


@EACH
def test_events_of_no_channels(encoding):
    nothing = torch.zeros(2, 0).int(), torch.zeros(5, 0, dtype=torch.int8)
    assert spike_linear_events(*nothing, encoding=encoding, group=4).shape == (2, 5, 0)
    found = spike_linear_events(*nothing, encoding=encoding)
    assert torch.equal(found, torch.zeros(2, 5, dtype=torch.int64))


def test_events_refuse_what_does_not_fit():
    count, weight = torch.ones(2, 8, dtype=torch.int32), torch.ones(3, 8, dtype=torch.int8)
    refuses("weight must be torch.int8", spike_linear_events, count, weight.float(), encoding="ternary")
    refuses("weight must be torch.int8", spike_linear_events, count, weight[:, 1:], encoding="ternary")
    refuses("group=3 must divide the 8 channels", spike_linear_events, count, weight, encoding="ternary", group=3)
    refuses("no negative counts", spike_linear_events, -count, weight, encoding="bitwise")

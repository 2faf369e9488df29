"""How sparse spikes are: figures of spike counts, and the energy that they stand for.

A count s fires the bits of |s| over time steps, with its sign (ops.spike_encode, "bidirectional"). Its nine lowest bits
are cut into three windows of three steps. The report's sparsity, 69.15 % (section 5.5 and Figure 9), is the share of
windows without a spike: mean over i = 0, 1, 2 of P(((|s| >> 3 i) & 7) = 0). It is neither the share of counts that are
zero nor that of bits that are zero, which are given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

WINDOW_STEPS, NUM_WINDOWS = 3, 3
NUM_STEPS = WINDOW_STEPS * NUM_WINDOWS
"""Steps that windows are cut from: counts up to 511. Higher bits of rare larger counts are in no window."""

SHOWN_COUNTS = 16
"""Bins of the histogram of counts, 0 to 15; those above share one more."""

ADD_PJ, INT8_MAC_PJ, FP16_MAC_PJ = 0.03, 0.23, 1.5
"""Energy of an INT8 addition, an INT8 and an FP16 multiply-accumulate at 45 nm, in pJ, as in the report's eq. 24.
Source: Horowitz, "Computing's energy problem", ISSCC 2014 (8-bit add 0.03, 8-bit multiply 0.2, fp16 add 0.4, fp16
multiply 1.1)."""

_LOW = 1 << NUM_STEPS
_CODES = 2 * _LOW


@dataclass(frozen=True)
class Energy:
    """Ideal energy of a value of the input times a weight, in pJ, and the shares saved against both kinds of MAC.

    Assumes event-driven hardware: a spike costs one INT8 addition per weight, a step without one nothing. Shifts of bit
    planes, thresholds, scales, memory traffic and control are free.
    """

    pj: float
    saved_fp16: float
    saved_int8: float


@dataclass(frozen=True)
class SpikeFigures:
    """What a set of counts looks like; shares are of 1.

    silent_windows: share of 3-step windows without a spike, the report's sparsity. zero_counts: of counts that are 0.
    zero_bits: of the nine steps of the windows. at_most_7: of counts with |s| <= 7, which one window holds.
    mean_spikes: spikes of a value over all of its bits ("per channel" in the report, 1.13). mean_count: |s|, which is
    what binary and ternary codes fire. silent_channels: share of channels that never fired, num_channels of how many.
    window_spikes: share of windows with 0, 1, 2, 3 spikes. counts: share of |s| = 0 ... 15 and above.
    num_values: counts that were seen.
    """

    silent_windows: float
    zero_counts: float
    zero_bits: float
    at_most_7: float
    mean_spikes: float
    mean_count: float
    silent_channels: float
    num_channels: int
    window_spikes: tuple[float, ...]
    counts: tuple[float, ...]
    energy: Energy
    num_values: int

    def plain(self) -> dict:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Tally:
    """Sums on the host; tallies add up. codes int64 [1024]: see SpikeStatistics. channel_spikes int64 [channels]."""

    codes: Tensor
    magnitude: int
    channel_spikes: Tensor
    num_values: int

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.codes + other.codes,
            self.magnitude + other.magnitude,
            torch.cat([self.channel_spikes, other.channel_spikes]),
            self.num_values + other.num_values,
        )

    def figures(self) -> SpikeFigures:
        """Raises ValueError where nothing was seen."""
        if not self.num_values:
            raise ValueError("there are no spike counts to describe: no token has reached these neurons")
        low = (self.codes[:_LOW] + self.codes[_LOW:]).double() / self.num_values
        exact = self.codes[:_LOW].double() / self.num_values
        in_window = _spikes_in_windows() @ low
        mean_spikes = int(self.channel_spikes.sum()) / self.num_values
        zero_bits = 1 - float(_popcount(torch.arange(_LOW)).double() @ low) / NUM_STEPS
        shown = exact[:SHOWN_COUNTS].tolist()
        return SpikeFigures(
            silent_windows=float(in_window[0]),
            zero_counts=shown[0],
            zero_bits=zero_bits,
            at_most_7=float(exact[:8].sum()),
            mean_spikes=mean_spikes,
            mean_count=self.magnitude / self.num_values,
            silent_channels=float((self.channel_spikes == 0).double().mean()),
            num_channels=len(self.channel_spikes),
            window_spikes=tuple(in_window.tolist()),
            counts=(*shown, max(0.0, 1 - sum(shown))),
            energy=energy(mean_spikes),
            num_values=self.num_values,
        )


class SpikeStatistics:
    """Sums over the counts of one neuron, on the device where they are; nothing is copied to the host meanwhile.

    Sums are exact integers. Histogram bin c < 512 holds counts of |s| = c, bin 512 + c those of larger |s| whose nine
    lowest bits are c.
    """

    def __init__(self, num_channels: int, *, device: torch.device | str = "cpu"):
        self.num_values = 0
        self._sums = torch.zeros(_CODES + 1 + num_channels, dtype=torch.int64, device=device)
        self._codes, self._magnitude, self._channels = self._sums.split([_CODES, 1, num_channels])

    @torch.no_grad()
    def add(self, count: Tensor) -> None:
        """count: integers [..., channels]."""
        magnitude = count.reshape(-1, len(self._channels)).abs()
        codes = torch.where(magnitude < _LOW, magnitude, (magnitude & (_LOW - 1)) + _LOW).flatten().long()
        one = torch.ones(1, dtype=torch.int64, device=codes.device)
        self._codes.scatter_add_(0, codes, one.expand(len(codes)))
        self._magnitude += magnitude.sum()
        self._channels += _popcount(magnitude).sum(0)
        self.num_values += count.numel()


def tallies(statistics: Sequence[SpikeStatistics]) -> list[Tally]:
    """The sums on the host: one copy for all of them, which are on one device."""
    if not statistics:
        return []
    host = torch.cat([each._sums for each in statistics]).cpu()
    found = []
    for each, sums in zip(statistics, host.split([len(each._sums) for each in statistics])):
        found.append(Tally(sums[:_CODES], int(sums[_CODES]), sums[_CODES + 1 :], each.num_values))
    return found


@torch.no_grad()
def sparsity(count: Tensor) -> Tensor:
    """The share of silent 3-step windows of integer counts of any shape, an fp32 scalar on their device."""
    magnitude = count.abs()
    windows = [magnitude >> (WINDOW_STEPS * i) & (2**WINDOW_STEPS - 1) for i in range(NUM_WINDOWS)]
    return torch.stack([(window == 0).float().mean() for window in windows]).mean()


def energy(mean_spikes: float) -> Energy:
    """Report, eq. 24. mean_spikes: of a value. The report's 1.13 makes 0.034 pJ, 97.7 % and 85.2 % saved."""
    spent = mean_spikes * ADD_PJ
    return Energy(spent, 1 - spent / FP16_MAC_PJ, 1 - spent / INT8_MAC_PJ)


def _popcount(x: Tensor) -> Tensor:
    """Ones in the binary form of non-negative integers below 2^31."""
    x = x - (x >> 1 & 0x55555555)
    x = (x & 0x33333333) + (x >> 2 & 0x33333333)
    x = x + (x >> 4) & 0x0F0F0F0F
    x = x + (x >> 8)
    return x + (x >> 16) & 0x3F


def _spikes_in_windows() -> Tensor:
    """fp64 [4, 512]: the share of the windows of each nine-bit number that hold so many spikes."""
    numbers = torch.arange(_LOW)
    spikes = [_popcount(numbers >> (WINDOW_STEPS * i) & (2**WINDOW_STEPS - 1)) for i in range(NUM_WINDOWS)]
    held = torch.stack(spikes)[None] == torch.arange(WINDOW_STEPS + 1)[:, None, None]
    return held.double().mean(1)

"""Statistics of spike counts: by brute force, and against the figures of the report and of its worked example."""

from __future__ import annotations

import pytest
import torch

import ops
from sbtrain.spiking.statistics import SHOWN_COUNTS, SpikeStatistics, energy, sparsity, tallies

SWEEP = {2.0: 0.728, 2.5: 0.711, 3.0: 0.695, 3.5: 0.679, 4.0: 0.664}
"""Silent windows by k of heavy-tailed inputs, simulated; the report's Table 11 has .730 .709 .692 .677 .664."""


def laplace(*shape: int, seed: int = 0) -> torch.Tensor:
    uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).log()


def tally_of(*counts: torch.Tensor):
    statistics = SpikeStatistics(counts[0].shape[-1])
    for count in counts:
        statistics.add(count)
    return tallies([statistics])[0]


def bits_of(value: int) -> list[int]:
    """Lowest first, of |value|; longer than nine where it has to be."""
    return [int(bit) for bit in reversed(format(abs(value), "b").zfill(9))]


def test_figures_by_brute_force():
    generator = torch.Generator().manual_seed(1)
    count = torch.randint(-12, 13, (40, 6), generator=generator, dtype=torch.int32)
    count[0] = torch.tensor([511, -512, 513, 5000, -(2**20) - 7, 0])
    count[:, 3] = 0
    figures = tally_of(count[:7].reshape(7, 1, 6), count[7:]).figures()
    values = count.flatten().tolist()
    bits = [bits_of(value) for value in values]
    windows = [sum(each[start : start + 3]) for each in bits for start in (0, 3, 6)]
    assert figures.num_values == 240 and figures.num_channels == 6
    assert figures.window_spikes == pytest.approx([windows.count(spikes) / len(windows) for spikes in range(4)])
    assert figures.silent_windows == figures.window_spikes[0]
    assert figures.zero_counts == pytest.approx(values.count(0) / 240)
    assert figures.at_most_7 == pytest.approx(sum(abs(value) <= 7 for value in values) / 240)
    assert figures.mean_spikes == pytest.approx(sum(map(sum, bits)) / 240)
    assert figures.mean_count == pytest.approx(sum(map(abs, values)) / 240)
    assert figures.zero_bits == pytest.approx(1 - sum(sum(each[:9]) for each in bits) / 240 / 9)
    assert figures.silent_channels == pytest.approx(1 / 6)
    shown = [sum(abs(value) == bin for value in values) / 240 for bin in range(SHOWN_COUNTS)]
    assert figures.counts == pytest.approx((*shown, 1 - sum(shown)))
    assert float(sparsity(count)) == pytest.approx(figures.silent_windows)


def test_mean_spikes_are_those_of_the_code():
    count, _ = ops.spike_count(laplace(64, 48))
    spikes = ops.spike_encode(count, encoding="bidirectional")
    assert tally_of(count).figures().mean_spikes == pytest.approx(float(spikes.abs().sum()) / count.numel())
    ternary = ops.spike_encode(count, encoding="ternary")
    assert tally_of(count).figures().mean_count == pytest.approx(float(ternary.abs().sum()) / count.numel())


@pytest.mark.parametrize("k", SWEEP)
def test_the_definition_gives_the_reports_sparsity_and_its_slope(k):
    count, _ = ops.spike_count(laplace(300, 2048), k=k)
    figures = tally_of(count).figures()
    assert figures.silent_windows == pytest.approx(SWEEP[k], abs=0.012)
    if k == 3.0:
        assert figures.window_spikes == pytest.approx((0.70, 0.20, 0.09, 0.01), abs=0.015)
        assert figures.zero_bits < figures.at_most_7 and figures.zero_counts < 0.25  # other figures than the sparsity


def test_tallies_add_up():
    counts = [torch.randint(-9, 10, (5, width)) for width in (4, 8)]
    together = tally_of(counts[0]) + tally_of(counts[1])
    flat = torch.cat([count.flatten() for count in counts])[:, None]
    ours, plain = together.figures(), tally_of(flat).figures()
    assert ours.window_spikes == plain.window_spikes and ours.mean_spikes == plain.mean_spikes
    assert (ours.num_channels, ours.num_values) == (12, 60)


def test_energy_of_the_reports_worked_example():
    found = energy(1.13)
    assert found.pj == pytest.approx(0.0339) and round(found.pj, 3) == 0.034
    assert (round(found.saved_fp16, 3), round(found.saved_int8, 3)) == (0.977, 0.853)
    as_printed = 1 - round(found.pj, 3) / 0.23  # the report rounds to 0.034 pJ first
    assert round(as_printed, 3) == 0.852


def test_nothing_seen_is_said():
    assert tallies([]) == []
    with pytest.raises(ValueError, match="no spike counts to describe"):
        tallies([SpikeStatistics(4)])[0].figures()


def test_all_silent():
    figures = tally_of(torch.zeros(3, 5, dtype=torch.int32)).figures()
    assert figures.silent_windows == figures.zero_counts == figures.zero_bits == figures.silent_channels == 1.0
    assert figures.energy.pj == figures.mean_spikes == 0.0 and figures.energy.saved_fp16 == 1.0


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_host():
    count = torch.randint(-900, 900, (2000, 96), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    statistics, there = SpikeStatistics(96, device="cuda"), count.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics.add(there)
        silent = sparsity(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tallies([statistics])[0].figures() == tally_of(count).figures()
    assert float(silent) == pytest.approx(float(sparsity(count)))

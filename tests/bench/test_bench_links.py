"""The model of exchanges on more ranks, and the command that measures links."""

from __future__ import annotations

import pytest

from sbtrain.bench.layouts import sequence_layout_of
from sbtrain.bench.scaling import Link, fit, halo_s, lasp2_s, ulysses_s, zeco_s
from sbtrain.bench.shapes import model_config

LINK = Link(latency_s=1e-5, bytes_per_s=1e11)
MODEL = model_config("7b", num_layers=2, pattern="LS")  # 28/4 heads of 128, window 4097


def test_a_link_is_found_in_its_own_times():
    sizes = [4096, 1 << 18, 1 << 24]
    link = fit(sizes, [LINK.seconds(size) for size in sizes])
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((LINK.latency_s, LINK.bytes_per_s))
    with pytest.raises(ValueError, match="measure again"):
        fit(sizes, [3.0, 2.0, 1.0])


def test_times_by_hand():
    state = 4 * 128 * 128 * 4
    assert lasp2_s(MODEL, sp=4, link=LINK) == pytest.approx(3 * (1e-5 + (state + 4 * 128 * 4) / 1e11))
    assert zeco_s(MODEL, sp=4, link=LINK, num_blocks=2) == pytest.approx(5 * (1e-5 + state / 2 / 1e11))
    assert halo_s(MODEL, sp=4, shard_tokens=2048, link=LINK) == pytest.approx(2e-5 + 2 * 4096 * 4 * 128 * 2 / 1e11)
    assert halo_s(MODEL, sp=2, shard_tokens=1024, link=LINK) == pytest.approx(1e-5 + 2 * 1024 * 4 * 128 * 2 / 1e11)
    assert ulysses_s(MODEL, sp=4, shard_tokens=1000, link=LINK) == pytest.approx(
        12e-5 + 2 * (28 + 4) * 128 * 1000 * 2 * 0.75 / 1e11
    )
    assert ulysses_s(MODEL, sp=6, shard_tokens=1000, link=LINK) is None


@pytest.mark.parametrize("text", ["0", "x", "4:", "4:halo", "4:auto", "-2", "4:zeco:2"])
def test_layouts_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match=f"sp={text} is not a layout; write for example sp=1,4"):
        sequence_layout_of(text)


def test_layouts_as_a_key_writes_them():
    assert sequence_layout_of("1").sp == 1
    zeco, ulysses = sequence_layout_of("4:zeco"), sequence_layout_of("4:ulysses")
    assert (zeco.sp, zeco.sp_algorithm.L.name, zeco.sp_algorithm.S.name) == (4, "zeco", "halo")
    assert (ulysses.sp_algorithm.L.name, ulysses.sp_algorithm.S.name) == ("ulysses", "ulysses")

"""Who is missing, from what is known of every rank: one table."""

from __future__ import annotations

import pytest

from parallel.verdict import Limits, Sight, decide, named

WHO = [f"host h{rank // 2}, process {100 + rank}" for rank in range(12)]
WATCHED = Limits(timeout_s=60, silent_s=24)
GATHER = Sight("lasp2 all-gather", 812, waiting=True, at="lasp2.py:70", stayed_s=61, frozen_s=61)
EARLY = Sight("lasp2 all-gather", 812, waiting=True, stayed_s=50, frozen_s=50)
FRESH = Sight("lasp2 all-gather", 812, waiting=True, stayed_s=2, frozen_s=2)
DATA = Sight("data", 811, at="loader.py:54", stayed_s=62, frozen_s=62)
SPIN = Sight("data", 811, at="loader.py:54", stayed_s=62, frozen_s=0)
COMPUTE = Sight("forward", 811, stayed_s=3)
DEAD = Sight("forward", 810, stayed_s=4, silent_s=31)
SAVE = Sight("checkpoint save", 811, patient=True, stayed_s=500, frozen_s=500)
SAVE_WAIT = Sight("checkpoint save: barrier", 811, waiting=True, patient=True, stayed_s=500, frozen_s=500)
LONG = Sight("lasp2 all-gather", 812, waiting=True, stayed_s=130, frozen_s=130)
OTHER = Sight("together", 813, waiting=True, stayed_s=130, frozen_s=130)
GPU = Sight("sum of losses", 900, waiting=True, device="'lasp2 all-gather' (no. 812)", stayed_s=61, frozen_s=61)
GONE = Sight("between steps", 900, stayed_s=3, silent_s=500, left=True)
SILENT_WAIT = Sight("lasp2 all-gather", 812, waiting=True, stayed_s=50, silent_s=31)
SILENT_SAVE = Sight("checkpoint save", 811, patient=True, stayed_s=50, frozen_s=50, silent_s=31)
DEAD_SAVE = Sight("checkpoint save", 811, patient=True, stayed_s=50, frozen_s=50, silent_s=61)

TABLE = [
    # name, sights by rank, who asks, seconds since this rank lost a connection, words of the line (None: no verdict)
    ("all is well", [FRESH, COMPUTE], 0, None, None),
    ("not yet", [EARLY, DATA], 0, None, None),
    ("killed", [GATHER, DEAD], 0, None, ["rank 1 (host h0, process 101): no sign of life for 31 s", "'forward' (no."]),
    ("killed, the primitive", [GATHER, DEAD], 0, None, ["rank 0 waits in 'lasp2 all-gather' (no. 812, lasp2.py:70)"]),
    ("killed, several", [DEAD, GATHER, DEAD], 1, None, ["ranks 0, 2 (the first is host h0, process 100)"]),
    ("killed while others save", [SAVE_WAIT, DEAD, SAVE], 0, None, ["rank 1", "no sign of life"]),
    ("killed, seen by a busy rank", [DATA, DEAD], 0, None, ["rank 1", "rank 0 is in 'data'"]),
    ("asleep", [GATHER, DATA], 0, None, ["rank 1", "still in 'data' (no. 811, loader.py:54) after 62 s; rank 0 waits"]),
    ("spinning", [GATHER, SPIN], 0, None, ["rank 1", "still in 'data'"]),
    ("asleep, of four", [GATHER, GATHER, GATHER, DATA], 1, None, ["rank 3 (host h1", "rank 1 waits in"]),
    ("a neighbor's neighbor", [OTHER, GATHER, DATA], 0, None, ["rank 2", "rank 0 waits in 'together'"]),
    ("two asleep", [GATHER, DATA, DATA], 0, None, ["ranks 1, 2", "still in 'data'"]),
    ("the late one itself leaves it to others", [GATHER, DATA], 1, None, None),
    ("only one of two waits long", [DATA, EARLY, DATA], 0, None, None),
    ("all busy", [DATA, DATA, SAVE], 0, None, None),
    ("the other computes on", [GATHER, COMPUTE], 0, None, None),
    ("a long save", [GATHER, SAVE], 0, None, None),
    ("a long save, waited for inside", [SAVE_WAIT, SAVE], 0, None, None),
    ("all wait", [GATHER, GATHER], 0, None, None),
    ("all wait for twice the time", [LONG, LONG], 0, None, ["all 2 ranks wait, none is missing", "'lasp2 all-gather'"]),
    ("in different places", [LONG, OTHER], 0, None, ["'lasp2 all-gather' (no. 812), rank 1 in 'together' (no. 813)"]),
    ("a silent rank is not who waits", [DATA, SILENT_WAIT], 0, None, ["rank 1 (host", "; rank 0 is in 'data'"]),
    ("silent in a save", [GATHER, SILENT_SAVE], 0, None, None),
    ("silent in a save for the timeout", [GATHER, DEAD_SAVE], 0, None, ["rank 1", "no sign of life for 61 s"]),
    ("silent in a save, connection lost", [GATHER, SILENT_SAVE], 0, 3, ["rank 1", "no sign of life for 31 s"]),
    ("one has left, the other works on", [DATA, GONE], 0, None, None),
    ("one has left, the others wait", [LONG, GONE, LONG], 0, None, ["2 ranks wait and rank 1 has left: in 'lasp2"]),
    ("one has left, another is late", [GATHER, GONE, DATA], 0, None, ["rank 2", "still in 'data'"]),
    ("a GPU behind", [GPU, DEAD], 0, None, ["'sum of losses'", "its GPU has not finished 'lasp2 all-gather' (no. 8"]),
    ("connection lost", [FRESH, DEAD], 0, 3, ["rank 1", "no sign of life", "rank 0 lost a connection in 'lasp2"]),
    ("connection lost, nobody silent yet", [FRESH, COMPUTE], 0, 3, None),
    ("connection lost to a sleeper", [FRESH, DATA], 0, 3, ["rank 1", "still in 'data'", "rank 0 lost a connection"]),
    ("connection lost, one in a save", [FRESH, SAVE], 0, 3, None),
    ("connection lost, one in a save for long", [FRESH, SAVE], 0, 60, ["rank 0 lost", "the network failed"]),
    ("connection lost, all alive", [FRESH, COMPUTE], 0, 60, ["every rank gives signs of life: the network failed"]),
]  # fmt: skip


@pytest.mark.parametrize(("sights", "rank", "broken_s", "words"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_verdicts(sights, rank, broken_s, words):
    line = decide(sights, WHO, rank=rank, limits=Limits(WATCHED.timeout_s, WATCHED.silent_s, broken_s))
    if words is None:
        assert line is None
    else:
        assert [word for word in words if word not in line] == [], line
        assert "\n" not in line and line.endswith("start the same command again to go on from the newest checkpoint")


@pytest.mark.parametrize(
    ("sights", "broken_s", "words"),
    [
        ([FRESH, SAVE], 3, "still in 'checkpoint save'"),
        ([FRESH, DEAD], 3, "no sign of life"),
        ([FRESH, COMPUTE], 60, "every rank gives signs of life: one took too long"),
    ],
)
def test_a_limit_of_torch_that_passed_is_no_lost_connection(sights, broken_s, words):
    limits = Limits(WATCHED.timeout_s, WATCHED.silent_s, broken_s, gave_up=True)
    line = decide([*sights, FRESH], WHO, rank=0, limits=limits)
    assert "rank 0 gave up waiting in 'lasp2" in line and "connection" not in line
    assert words in line, line


def test_many_ranks_are_counted():
    assert named(list(range(12)), WHO) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more (the first is host h0, process 100)"

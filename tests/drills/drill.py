"""What a drill is, drawn from a number: a job of four tiny layers, one fault, and the moment at which it happens."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drills.points import Fault

STAGE_STEPS = (8, 6)
STEPS = sum(STAGE_STEPS)
EVERY = 3
DUE = sorted({*range(EVERY, STEPS, EVERY), STAGE_STEPS[0], STEPS})
"""Steps at which a run saves: every EVERY steps and at the ends of stages."""
BATCH = 128
LEAST_POINTS = 10
"""A step has more points than that (drills.points)."""

JOB = (
    "model.pattern=LSLF",
    "model.num_layers=4",
    f"stages.ctx_32.tokens={STAGE_STEPS[0] * BATCH}",
    f"stages.ctx_64.tokens={STAGE_STEPS[1] * BATCH}",
    "stop_after=ctx_64",
    "evaluation.tokens=0",
    "runtime.timeout_s=8",
)
LAYOUTS = {
    "dp2 pp2": (2, ()),
    "sp2 tp2": (2, ("stages.ctx_32.layout.sp=2", "stages.ctx_64.layout={tp: 2, pp: 1}")),
    "dp3 dp3": (3, ("stages.ctx_32.global_batch_tokens=96", "stages.ctx_32.micro_batch=1", "stages.ctx_32.tokens=768",
                    "stages.ctx_64.global_batch_tokens=192", "stages.ctx_64.tokens=1152", "stages.ctx_64.layout.pp=1")),
    "tp2dp2 sp2pp2": (4, ("stages.ctx_32.layout.tp=2", "stages.ctx_64.layout={sp: 2, pp: 2}")),
}  # fmt: skip
"""Ranks, and the overrides that lay two stages out on them, by name."""

KINDS = {
    "kill_one": (0, 11),
    "kill_all": (0, 11),
    "truncate": (6, 10),
    "lose_ledger": (3, 11),
    "fill": (0, 8),
    "corrupt": (0, 8),
    "sigterm": (1, 11),
}
"""Kinds of faults, and behind which steps they happen."""
CHECKPOINTS = {"truncate": 2, "lose_ledger": 1}
"""Checkpoints that must be there for a fault to be one."""


@dataclass(frozen=True)
class Drill:
    """One drill. share: which file is cut, or of a checkpoint's bytes what is left of the disk."""

    seed: int
    layout: str
    asynchronous: bool
    fault: Fault
    share: float
    shard: str

    @property
    def kind(self) -> str:
        return self.fault.kind

    @property
    def num_ranks(self) -> int:
        return LAYOUTS[self.layout][0]

    def arguments(self) -> list[str]:
        """Of launch/train.py, beside recipe and run directory."""
        saving = [f"checkpoint.asynchronous={str(self.asynchronous).lower()}", "checkpoint.snapshot_every_steps=2"]
        return [*job(self.layout), f"checkpoint.every_steps={EVERY}", *(saving if self.asynchronous else saving[:1])]

    def __str__(self) -> str:
        saves = "background" if self.asynchronous else "synchronous"
        return f"seed {self.seed}: {self.kind}, {self.layout}, {saves}"


def job(layout: str) -> list[str]:
    """Overrides of the job on a layout, but for how it saves."""
    ours = LAYOUTS[layout][1]
    given = {each.split("=")[0] for each in ours}
    return [*(each for each in JOB if each.split("=")[0] not in given), *ours]


def draw(seed: int, kind: str = "", *, layout: str = "", asynchronous: bool | None = None) -> Drill:
    """The drill of that number; what is given is not drawn."""
    dice = random.Random(seed)
    kind = kind or dice.choice(list(KINDS))
    layout = layout or dice.choice(list(LAYOUTS))
    asynchronous = dice.random() < 0.5 if asynchronous is None else asynchronous
    num_ranks = LAYOUTS[layout][0]
    rank, step = dice.randrange(num_ranks), dice.randint(*KINDS[kind])
    points = dice.choice((dice.randrange(12), dice.randrange(80)))
    in_writer = asynchronous and kind not in ("corrupt", "sigterm") and dice.random() < 0.5
    if in_writer:
        points = dice.randrange(60 if rank == 0 else 8)
    amount = dice.choice((0, dice.randrange(1, 40)))
    fault = Fault(
        kind,
        rank=rank,
        step=step,
        points=points if in_writer else min(points, LEAST_POINTS * (STEPS - 1 - step)),
        num_checkpoints=CHECKPOINTS.get(kind, 0),
        in_writer=in_writer,
        amount=min(amount, LEAST_POINTS) if kind == "sigterm" else amount,
    )
    return Drill(seed, layout, asynchronous, fault, share=dice.random(), shard=dice.choice(("one", "two")))

"""RunState: where a run stands, apart from its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class RunState:
    """step and tokens count over the whole run; stage_tokens is what the present stage has consumed of its budget.

    stage: name of the stage. loader: what the data loader needs to go on (see sbtrain.data.loader). watch: what the
    numbers of the steps before are compared with (see sbtrain.train.numbers); None in checkpoints without.
    """

    stage: str
    step: int = 0
    tokens: int = 0
    stage_tokens: int = 0
    loader: dict | None = None
    watch: dict | None = None

    def advanced(self, num_tokens: int) -> RunState:
        """The state after one more step of num_tokens."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + num_tokens,
            stage_tokens=self.stage_tokens + num_tokens,
            loader=None,
        )

    def entering(self, stage: str) -> RunState:
        """The state at the start of the next stage: its budget and its data begin afresh."""
        return replace(self, stage=stage, stage_tokens=0, loader=None)

    @classmethod
    def required(cls) -> list[str]:
        """What every file of one has."""
        return [key for key in cls.__dataclass_fields__ if key != "watch"]

    @classmethod
    def from_json(cls, content: dict) -> RunState:
        """The state in a file that may hold more. Raises KeyError where it lacks one of required()."""
        return cls(**{key: content[key] for key in cls.required()}, watch=content.get("watch"))

    def to_json(self) -> dict:
        """Plain values for a file."""
        return asdict(self)

"""Rules of the recipe's block `checkpoint`."""

from __future__ import annotations

from sbtrain.config.schema import CheckpointConfig


def check_checkpoint(checkpoint: CheckpointConfig) -> None:
    """Raises ValueError: one line with the key and the fix."""
    for key in ("every_steps", "snapshot_every_steps", "keep_last", "keep_every_steps"):
        if getattr(checkpoint, key) < 0:
            raise ValueError(f"checkpoint.{key}={getattr(checkpoint, key)} is too small; give 0 or more")
    every, kept = checkpoint.every_steps, checkpoint.keep_every_steps
    if every and kept % every:
        raise ValueError(
            f"checkpoint.keep_every_steps={kept} is no multiple of checkpoint.every_steps={every}, so some would never "
            f"be saved; give {every * -(-kept // every)} or 0"
        )
    if checkpoint.snapshot_every_steps and not checkpoint.asynchronous:
        raise ValueError(
            f"checkpoint.snapshot_every_steps={checkpoint.snapshot_every_steps} needs checkpoint.asynchronous=true; "
            "set one of them"
        )

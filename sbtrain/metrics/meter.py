"""Meter: turns what a step knows (loss, tokens, time) into the one record that metrics.jsonl keeps of it.

Speed and utilization follow the usual definitions: tokens/s/GPU counts every token of the step, TFLOP/s counts the
model's own training FLOPs (`sbtrain.model.flops`, three times the forward pass; recomputation is not credited), and
MFU is their share of the GPU's peak.
"""

from __future__ import annotations

import resource
import time

import torch


class Meter:
    """Measures the steps of one stage. Every rank may keep one; the loss it is given is already averaged over ranks."""

    def __init__(self, *, world_size: int, flops_per_token: float, peak_tflops: float = 0.0):
        """flops_per_token: training FLOPs, forward and backward; peak_tflops: of one GPU, 0: unknown (mfu is None)."""
        self.world_size = world_size
        self.flops_per_token = flops_per_token
        self.peak_tflops = peak_tflops
        self._last = time.perf_counter()
        self._num_recorded = 0
        self._measured_tokens, self._measured_s = 0, 0.0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def record(
        self,
        *,
        step: int,
        tokens: int,
        stage: str,
        loss: float,
        grad_norm: float,
        lr: float,
        step_tokens: int,
        extra: dict | None = None,
    ) -> dict:
        """The metrics.jsonl object of the step that just ended; its time is what passed since the last call.

        step: number of the step, from 1 over the whole run; tokens: seen by the whole run, this step included;
        step_tokens: of this step over all ranks; extra: what the model adds, JSON values, must not reuse a name.
        The first step of a stage also pays for start-up: it carries "first_step" and stays out of averages().
        """
        now = time.perf_counter()
        step_time_s, self._last = now - self._last, now
        record = {"step": step, "tokens": tokens, "stage": stage, "loss": loss, "grad_norm": grad_norm, "lr": lr}
        record.update(self._speed(step_tokens, step_time_s))
        record.update(peak_memory_bytes=peak_memory_bytes(), world_size=self.world_size)
        if self._num_recorded == 0:
            record["first_step"] = True
        else:
            self._measured_tokens += step_tokens
            self._measured_s += step_time_s
        self._num_recorded += 1
        clash = sorted(record.keys() & (extra or {}).keys())
        assert not clash, f"extra metrics {clash} are names of the record itself"
        return {**record, **(extra or {})}

    def restart_clock(self) -> None:
        """Leave out what happened since the last record: evaluation, a checkpoint."""
        self._last = time.perf_counter()

    def averages(self) -> dict:
        """Speed over all steps but the first, with the names of the record; every value None before the second step."""
        if not self._measured_s:
            return dict.fromkeys(("step_time_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu"))
        average = self._speed(self._measured_tokens, self._measured_s)
        return {**average, "step_time_s": self._measured_s / (self._num_recorded - 1)}

    def _speed(self, num_tokens: int, seconds: float) -> dict:
        tokens_per_s = num_tokens / max(seconds, 1e-9) / self.world_size
        tflops = tokens_per_s * self.flops_per_token / 1e12
        return {
            "step_time_s": seconds,
            "tokens_per_s_per_gpu": tokens_per_s,
            "tflops_per_gpu": tflops,
            "mfu": tflops / self.peak_tflops if self.peak_tflops > 0 else None,
        }


def peak_memory_bytes() -> int:
    """Most memory this rank has held: on the GPU since the Meter began, on CPU the process's largest resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

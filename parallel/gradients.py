"""Gradient buffers in fp32, reduced over the data-parallel ranks while the backward pass runs (megatron's DDP)."""

from __future__ import annotations

import weakref

from torch import Tensor

import ops
from ops.gradient_buffer import GradientBuffer
from parallel import mcore


def gradient_buffer(weight: Tensor) -> GradientBuffer | None:
    """Where an op may put weight's gradient itself (see ops.gradient_buffer); None outside of training steps."""
    offered = getattr(weight, "gradient_buffer", None)
    return offered if offered is not None and offered.is_open else None


def is_late(parameter) -> bool:
    """Whether parameter's gradient is complete only after the backward pass: others hold copies (sbtrain.moe.hot)."""
    return getattr(parameter, "has_copies", False)


class GradientBuffers(mcore.DistributedDataParallel):
    """megatron's DDP without its zeroing pass: the first gradient of a step is written over the buffer, later ones add.

    Saves one write and one read of every fp32 gradient a step.
    """

    def __init__(self, config, module, *, overlap: bool, one_bucket: bool = False):
        """overlap: reduce each bucket as soon as its gradients are complete. one_bucket: not before all of them are."""
        ddp = mcore.DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=overlap
        )
        super().__init__(config, ddp, module, disable_bucketing=one_bucket)
        self._written: set = set()
        self.loss_scale: float | None = None
        self.num_unfinished = 0
        for parameter in self.params_with_grad:
            parameter.gradient_buffer = _MainGradient(self, parameter)

    def begin_step(self, *, loss_scale: float) -> None:
        """Begin a step in which the summed losses are multiplied by loss_scale; ends with finish_grad_sync."""
        self.zero_grad_buffer()
        self.loss_scale = loss_scale

    def zero_grad_buffer(self) -> None:
        """Nothing has been written yet, and no step has begun."""
        self._written.clear()
        self.loss_scale, self.num_unfinished = None, 0
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            group.reset()

    def finish_grad_sync(self, force_all_reduce: bool = False) -> None:
        """Wait for (or do) the reduction; parameters that got no gradient this step count as zero.

        Raises RuntimeError when a gradient was written in a forward pass that no backward pass followed.
        """
        if self.num_unfinished:
            raise RuntimeError(
                f"{self.num_unfinished} forward passes wrote gradients and had no backward pass: "
                "do not recompute or drop the model's losses in a training step"
            )
        self.loss_scale = None
        for parameter in self.params_with_grad:
            if parameter not in self._written:
                parameter.main_grad.zero_()
        if self.ddp_config.overlap_grad_reduce:
            for group in self.expert_parallel_bucket_groups:
                if any(is_late(parameter) for parameter in group.params):
                    group.start_grad_sync(force_all_reduce)
        super().finish_grad_sync(force_all_reduce=force_all_reduce)

    def _make_backward_post_hook(self, parameter):
        def hook(*unused):
            if parameter.grad is not None:
                ops.accumulate(parameter.main_grad, parameter.grad, add=self.write(parameter))
                parameter.grad = None
            self.register_ready(parameter)

        return hook

    def write(self, parameter) -> bool:
        """Whether parameter's buffer holds a gradient of this step already; from now on it does."""
        held = parameter in self._written
        self._written.add(parameter)
        return held

    def register_ready(self, parameter) -> None:
        """One of the gradients that parameter gets from a micro-batch is complete: the reduction may start."""
        if self.ddp_config.overlap_grad_reduce and not is_late(parameter):
            self.param_to_bucket_group[parameter].register_grad_ready(parameter, self.force_all_reduce)


class _MainGradient:
    """ops.gradient_buffer.GradientBuffer over the main_grad of one parameter."""

    def __init__(self, owner: GradientBuffers, parameter):
        # weak: the parameter holds this, and would keep its buffers alive
        self._owner, self._parameter = weakref.ref(owner), weakref.ref(parameter)

    @property
    def is_open(self) -> bool:
        """Whether a step has begun, whose loss scale is known then."""
        owner = self._owner()
        return owner is not None and owner.loss_scale is not None

    @property
    def total(self) -> Tensor:
        return self._parameter().main_grad

    @property
    def scale(self) -> float:
        return self._owner().loss_scale

    def begin(self) -> bool:
        owner = self._owner()
        owner.num_unfinished += 1
        return owner.write(self._parameter())

    def finish(self) -> None:
        owner = self._owner()
        owner.num_unfinished -= 1
        owner.register_ready(self._parameter())

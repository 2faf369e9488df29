"""AdamW with fp32 master weights, its state sharded over the data-parallel ranks (ZeRO-1, megatron's optimizer)."""

from __future__ import annotations

import math

import torch

from parallel import mcore
from parallel.place import primitive


def build_optimizer(
    chunks: list, *, beta1: float, beta2: float, eps: float, weight_decay: float, clip_grad: float, new_lr_scale: float
):
    """megatron's distributed optimizer over DDP-wrapped chunks.

    Vectors (norms, biases) are not decayed. Parameters marked `is_new` get new_lr_scale times the learning rate.
    """
    config = mcore.OptimizerConfig(
        optimizer="adam",
        lr=1.0,
        bf16=chunks[0].config.bf16,
        params_dtype=chunks[0].config.params_dtype,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_eps=eps,
        weight_decay=weight_decay,
        clip_grad=clip_grad,
        use_distributed_optimizer=True,
    )
    vectors = mcore.ParamPredicate(name="vectors", fn=lambda parameter: parameter.ndim == 1)
    overrides = {mcore.ParamKey(predicate=vectors): {"wd_mult": 0.0}}
    if new_lr_scale != 1.0:
        overrides[mcore.ParamKey(attr="is_new")] = {"lr_mult": new_lr_scale}
    optimizer = mcore.get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW: one kernel instead of one per tensor
            group["fused"], group["foreach"] = True, False
    return optimizer


def step(optimizer, *, lr: float, clip_grad: float, sound: bool = True) -> float:
    """Clip the gradients to a norm of clip_grad (0: never), update the weights, return the norm before clipping.

    Where the norm is not finite nothing is updated: weights, moments and step count stay, on all ranks, which all get
    the same norm. sound: False on any rank, whose loss is not finite say, makes the norm NaN on all.
    torch's fused AdamW divides by the clipping factor while it reads the gradients, which saves passes over them.
    """
    set_learning_rate(optimizer, lr)
    optimizer.prepare_grads()
    if not sound:
        _spoil(optimizer)
    with primitive("gradient norm"):
        grad_norm = float(optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        return grad_norm
    too_long = (grad_norm + 1e-6) / clip_grad if clip_grad > 0 else 1.0
    for part in parts_of(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):  # apex or TransformerEngine are installed
            if clip_grad > 0:
                part.clip_grad_norm(clip_grad)
        elif too_long > 1:
            part.optimizer.grad_scale = torch.tensor(too_long, device=torch.cuda.current_device())
        else:
            part.optimizer.grad_scale = None
    optimizer.step_with_ready_grads()
    return grad_norm


@torch.no_grad()
def _spoil(optimizer) -> None:
    """Let this rank's gradients tell the others, through the norm, which they exchange anyway."""
    for part in parts_of(optimizer):
        for gradient in part.get_main_grads_for_grad_norm():
            gradient.fill_(math.nan)


def set_learning_rate(optimizer, lr: float) -> None:
    """Set the learning rate of every group, each scaled by its lr_mult."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def allocate_state(optimizer) -> None:
    """Make Adam's moments exist before the first step, as zeros, so that they can be saved or loaded into.

    megatron's way is a step with zero gradients; at a learning rate of 0 and with the step counts put back to 0 it
    changes nothing.
    """
    for part in parts_of(optimizer):
        if part.optimizer.state:
            continue
        set_learning_rate(part, 0.0)
        part._init_optimizer_states_with_dummy_values()
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # where apex and TransformerEngine count


@torch.no_grad()
def set_step_count(optimizer, step_count: int) -> None:
    """Go on from so many updates."""
    for part in parts_of(optimizer):
        for moments in part.optimizer.state.values():
            if "step" in moments:  # each has its own: a shared one would advance once per parameter
                moments["step"] = torch.full_like(moments["step"], step_count)
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):  # where apex and TransformerEngine count
                group["step"] = step_count


def step_count(optimizer) -> int:
    """Updates so far."""
    for part in parts_of(optimizer):
        for moments in part.optimizer.state.values():
            if "step" in moments:
                return int(moments["step"])
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
    return 0


def saved_step_count(common: dict) -> int:
    """Updates so far, as a checkpoint says. Raises KeyError or TypeError for what is no Engine.common_state()."""
    state = common["optimizer"]
    # checkpoints written before there were experts count steps where megatron does
    return int(state["step"] if "step" in state else state["optimizer"]["param_groups"][0]["step"])


def parts_of(optimizer) -> list:
    """megatron's optimizers of this rank: dense weights, experts. A stage without experts has a stub for them."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]

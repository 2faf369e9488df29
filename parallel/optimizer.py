"""AdamW with fp32 master weights, its state sharded over the data-parallel ranks (ZeRO-1, megatron's optimizer)."""

from __future__ import annotations

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


def step(optimizer, *, lr: float, clip_grad: float) -> float:
    """Clip the gradients to a norm of clip_grad (0: never), update the weights, return the norm before clipping.

    torch's fused AdamW divides by the clipping factor while it reads the gradients, which saves passes over them.
    """
    set_learning_rate(optimizer, lr)
    optimizer.prepare_grads()
    with primitive("gradient norm"):
        grad_norm = float(optimizer.get_grad_norm())
    too_long = (grad_norm + 1e-6) / clip_grad if clip_grad > 0 else 1.0
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):  # apex or TransformerEngine are installed
            if clip_grad > 0:
                part.clip_grad_norm(clip_grad)
        elif too_long > 1:
            part.optimizer.grad_scale = torch.tensor(too_long, device=torch.cuda.current_device())
        else:
            part.optimizer.grad_scale = None
    optimizer.step_with_ready_grads()
    return grad_norm


def set_learning_rate(optimizer, lr: float) -> None:
    """Set the learning rate of every group, each scaled by its lr_mult."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_mult"]


def allocate_state(optimizer) -> None:
    """Make Adam's moments exist before the first step, as zeros, so that they can be saved or loaded into.

    megatron's way is a step with zero gradients; at a learning rate of 0 and with the step counts put back to 0 it
    changes nothing.
    """
    for part in _parts(optimizer):
        if part.optimizer.state:
            continue
        set_learning_rate(part, 0.0)
        part._init_optimizer_states_with_dummy_values()
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        for group in part.optimizer.param_groups:
            group.pop("step", None)  # where apex and TransformerEngine count


def own_step_counts(optimizer) -> None:
    """Give each parameter its own Adam step tensor.

    After megatron 0.16.1 loads a checkpoint all parameters share one, which then advances once per parameter.
    """
    for part in _parts(optimizer):
        for state in part.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].detach().clone()


def _parts(optimizer) -> list:
    return getattr(optimizer, "chained_optimizers", [optimizer])

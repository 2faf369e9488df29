"""Rules of mixtures of experts: `model.moe` and `stages.NAME.experts`."""

from __future__ import annotations

from parallel.layout import Layout
from sbtrain.config.model_schema import ModelConfig, RouterScore
from sbtrain.config.moe_schema import PLAIN, Align
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import Recompute, Stage


def check_moe(model: ModelConfig) -> None:
    """model.moe holds a mixture that can be trained. Raises ValueError naming key and fix."""
    moe = model.moe
    least = {"num_experts": 1, "top_k": 1, "num_shared_experts": 0, "router_init_std": 0}
    least |= {"aux_loss_coeff": 0, "z_loss_coeff": 0, "bias_update_rate": 0, "capacity_factor": 0}
    for field, smallest in least.items():
        if not getattr(moe, field) >= smallest:
            raise ValueError(f"model.moe.{field}={getattr(moe, field)} is too small; give {smallest} or more")
    if moe.expert_ffn_size is not None and moe.expert_ffn_size < 1:
        raise ValueError(f"model.moe.expert_ffn_size={moe.expert_ffn_size} must be 1 or more; null is model.ffn_size")
    if moe.top_k > moe.num_experts:
        raise ValueError(f"model.moe.top_k={moe.top_k} exceeds model.moe.num_experts={moe.num_experts}; lower it")
    if moe.renormalize and moe.top_k == 1:
        raise ValueError(
            "model.moe.renormalize=true makes every weight 1 with model.moe.top_k=1, and the router learns nothing; "
            "set it to false"
        )
    if moe.exact_aux_loss and moe.aux_loss_coeff == 0:
        raise ValueError("model.moe.exact_aux_loss=true has no effect with model.moe.aux_loss_coeff=0; set it to false")
    if moe.bias_update_rate > 0 and moe.score is not RouterScore.sigmoid:
        raise ValueError(
            f"model.moe.bias_update_rate={moe.bias_update_rate} needs model.moe.score=sigmoid; set the rate to 0"
        )


def has_experts(model: ModelConfig) -> bool:
    """Whether the pattern has a mixture of experts."""
    return any(kind.moe for kind in parse_pattern(model.pattern, model.num_layers))


def ranks_problem(model: ModelConfig, layout: Layout) -> str | None:
    """Why the experts cannot be spread over the ranks of a layout (begins with `layout.`), or None."""
    if not has_experts(model):
        if layout.ep == 1:
            return None
        return (
            f"layout.ep={layout.ep} needs mixture-of-experts layers, which model.pattern '{model.pattern}' lacks; set 1"
        )
    if model.moe.num_experts % layout.ep:
        return (
            f"layout.ep={layout.ep} does not divide model.moe.num_experts={model.moe.num_experts}; "
            "choose an ep that does"
        )
    shared = model.moe.num_shared_experts * (model.moe.expert_ffn_size or model.ffn_size)
    if shared % layout.tp:
        return (
            f"layout.tp={layout.tp} does not divide the {shared} channels of the shared experts "
            "(model.moe.num_shared_experts x expert_ffn_size); choose a tp that does"
        )
    return None


def experts_problem(model: ModelConfig, stage: Stage) -> str | None:
    """Why a stage cannot run its experts so (begins with `experts.`), or None."""
    experts, layout = stage.experts, stage.layout
    if experts != PLAIN and not has_experts(model):
        return f"experts has no effect: model.pattern '{model.pattern}' has no layer with :m; remove the key"
    for field, smallest in {"max_copies": 0, "recompute_above_tokens": 0, "align_tokens": 1}.items():
        if getattr(experts, field) < smallest:
            return f"experts.{field}={getattr(experts, field)} is too small; give {smallest} or more"
    if experts.max_copies and layout.ep == 1:
        return f"experts.max_copies={experts.max_copies} copies nothing with layout.ep=1; set it to 0"
    if experts.max_copies > model.moe.num_experts:
        return (
            f"experts.max_copies={experts.max_copies} exceeds model.moe.num_experts={model.moe.num_experts}; lower it"
        )
    if not experts.copy_above > experts.release_below > 0:
        return (
            f"experts.copy_above={experts.copy_above} must exceed experts.release_below={experts.release_below}, "
            "and both 0, or experts would come and go; raise copy_above"
        )
    if experts.recompute_above_tokens and stage.recompute in (Recompute.selective, Recompute.full):
        return (
            f"experts.recompute_above_tokens={experts.recompute_above_tokens} has no effect with recompute="
            f"{stage.recompute.name}, which recomputes all experts; set it to 0"
        )
    if experts.align is Align.drop and experts.align_tokens == 1:
        return "experts.align=drop drops nothing with experts.align_tokens=1; set align=pad or a multiple"
    return None

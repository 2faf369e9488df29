"""One mixture-of-experts layer on the ranks of a layout, and the same in plain torch."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel import mcore
from parallel.layout import Layout
from parallel.mesh import Mesh
from sbtrain.config.model_schema import ModelConfig, MoEConfig, RouterScore
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import Precision, Recompute
from sbtrain.model.build import transformer_config
from sbtrain.moe.layer import MoELayer
from sbtrain.spiking.neuron import Sites

HIDDEN, WIDTH = 16, 12


def moe_model(moe: MoEConfig) -> ModelConfig:
    """A model shape with one mixture."""
    return ModelConfig(
        pattern="F:m", vocab_size=64, hidden_size=HIDDEN, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        ffn_size=WIDTH, norm_eps=1e-6, rope_theta=1e4, max_positions=64, tie_embeddings=False, qkv_bias=False,
        qk_norm=False, moe=moe,
    )  # fmt: skip


def weights_of(moe: MoEConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Random global weights."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "router.weight": (moe.num_experts, HIDDEN),
        "experts.linear_fc1": (moe.num_experts, 2 * WIDTH, HIDDEN),
        "experts.linear_fc2": (moe.num_experts, HIDDEN, WIDTH),
    }
    if moe.num_shared_experts:
        shapes["shared_experts.linear_fc1.weight"] = (2 * moe.num_shared_experts * WIDTH, HIDDEN)
        shapes["shared_experts.linear_fc2.weight"] = (HIDDEN, moe.num_shared_experts * WIDTH)
    return {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in shapes.items()}


def run_layer(
    rank: int,
    layout: Layout,
    moe: MoEConfig,
    inputs: list[Tensor],
    grads: list[Tensor],
    *,
    load: list[float] | None = None,
    forced: list[float] | None = None,
    hot: tuple[int, ...] = (),
    num_meta: int = 0,
    step_tokens: int | None = None,
    options: ExpertsConfig = PLAIN,
    recompute: Recompute = Recompute.none,
) -> dict:
    """Forward and backward of this rank's [T,1,D] (T may differ from rank to rank, and be 0)."""
    with ExitStack() as stack:
        mesh = stack.enter_context(Mesh.build(layout))
        model = moe_model(moe)
        config = transformer_config(model, layout, Precision.fp32)
        sites = Sites(model.spiking, layer=0, tp_group=mesh.groups.tp)
        layer = MoELayer(config, model=model, groups=mesh.groups, recompute=recompute, options=options, sites=sites)
        experts = slice(layer.dispatcher.first_local, layer.dispatcher.first_local + layer.dispatcher.num_local)
        with torch.no_grad():
            for name, weight in layer.named_parameters():
                whole = weights_of(moe)[name]
                weight.copy_(whole[experts] if name.startswith("experts") else whole)
                weight.main_grad = torch.zeros_like(weight)
        if load is not None:
            layer.router.load.copy_(torch.tensor(load))
        layer.router.forced = None if forced is None else torch.tensor(forced)
        layer.router.step_tokens = step_tokens or sum(len(x) - num_meta for x in inputs)
        layer.hot.chosen = hot
        layer.hot.begin_step()
        mcore.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
        x = inputs[rank].clone().requires_grad_()
        y = layer(x, num_meta)
        y.backward(grads[rank])
        for weight in layer.parameters():
            weight.main_grad += weight.grad
        layer.hot.hand_over()
        found = {name: weight.main_grad for name, weight in layer.named_parameters()}
        return dict(y=y.detach(), x_grad=x.grad, grads=found, tally=layer.router.tally.take())


def plain_layer(moe: MoEConfig, weights: dict[str, Tensor], x: Tensor, *, load: list[float] | None, num_meta: int = 0):
    """y [T,D] and the extra loss of the same layer, token by token and in fp64 (x and weights are)."""
    logits = x @ weights["router.weight"].T
    softmax = moe.score is RouterScore.softmax
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    rows = []
    for token, row in zip(x, scores):
        best = row.topk(moe.top_k)
        parts = best.values / best.values.sum() if moe.renormalize else best.values
        out = sum(p * _ffn(token, *(weights[f"experts.linear_fc{n}"][e] for n in (1, 2)))
                  for p, e in zip(parts, best.indices.tolist()))  # fmt: skip
        if moe.num_shared_experts:
            out = out + _ffn(token, *(weights[f"shared_experts.linear_fc{n}.weight"] for n in (1, 2)))
        rows.append(out)
    counted = slice(num_meta, None)
    shares = scores if softmax else scores / scores.sum(-1, keepdim=True)
    mean = shares[counted].mean(0)
    share = torch.full_like(mean, 1 / moe.num_experts) if load is None else torch.tensor(load, dtype=mean.dtype)
    loss = moe.aux_loss_coeff * moe.num_experts * (share * mean).sum()
    loss = loss + moe.z_loss_coeff * logits[counted].logsumexp(-1).square().mean()
    return torch.stack(rows), loss


def _ffn(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, up = (fc1 @ x).chunk(2)
    return fc2 @ (F.silu(gate) * up)


def plain_gradients(moe: MoEConfig, x: Tensor, grad: Tensor, **options) -> dict:
    """What run_layer should find, from plain_layer."""
    weights = {name: w.double().requires_grad_() for name, w in weights_of(moe).items()}
    x = x[:, 0].double().requires_grad_()
    y, loss = plain_layer(moe, weights, x, **options)
    ((y * grad[:, 0]).sum() + loss).backward()
    return dict(y=y.detach(), x_grad=x.grad, grads={name: w.grad for name, w in weights.items()})


def draw(*lengths: int, seed: int = 3) -> list[Tensor]:
    """Random [T,1,D], one for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 1, HIDDEN, generator=generator) for length in lengths]


def without_losses(moe: MoEConfig) -> MoEConfig:
    """The mixture as it is, its losses off."""
    return replace(moe, aux_loss_coeff=0.0, z_loss_coeff=0.0)

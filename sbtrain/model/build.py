"""From ModelConfig and Mesh to this rank's part of the model, with uninitialized weights; and their global names."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from parallel import mcore
from parallel.cpu import on_meta
from parallel.layout import Layout
from parallel.mesh import Mesh
from parallel.pipeline import stage_chunks
from parallel.sequence.choose import choose
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import ModelConfig, Precision, Recompute
from sbtrain.model.decoder import DecoderLayer
from sbtrain.model.hybrid import HybridModel
from sbtrain.model.stages import pipeline_chunks


def transformer_config(model: ModelConfig, layout: Layout, precision: Precision) -> mcore.TransformerConfig:
    """megatron's configuration of our model: no biases but q/k/v's, SwiGLU, losses weighted by tokens."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    moe = any(kind.moe for kind in parse_pattern(model.pattern, model.num_layers))
    return mcore.TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=precision is Precision.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        overlap_p2p_comm=layout.vpp > 1,  # without it the interleaved schedule mixes up what two stages exchange
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.sp,
        expert_model_parallel_size=layout.ep if moe else 1,  # a dense model of the same layout: the teacher
        expert_tensor_parallel_size=1,
        num_moe_experts=model.moe.num_experts if moe else None,
        moe_ffn_hidden_size=(model.moe.expert_ffn_size or model.ffn_size) if moe else None,
        moe_router_dtype="fp32",
        moe_router_pre_softmax=True,
        sequence_parallel=layout.tp_sequence_parallel,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )


def build_model(model: ModelConfig, mesh: Mesh, **options) -> HybridModel:
    """This rank's stage of the model where it is one chunk (layout.vpp is 1). options: those of build_chunks."""
    (built,) = build_chunks(model, mesh, **options)
    return built


def build_chunks(
    model: ModelConfig,
    mesh: Mesh,
    *,
    precision: Precision,
    recompute: Recompute = Recompute.none,
    seq_len: int,
    row_tokens: int | None = None,
    experts: ExpertsConfig = PLAIN,
) -> list[HybridModel]:
    """This rank's chunks of the model on its device; weights are uninitialized (see sbtrain.convert.start.fill).

    seq_len: of a document; row_tokens: of a row, None where that differs from call to call.
    Collective: ranks time their links where layout.sp_algorithm is auto; sp_choices of each chunk says what it chose
    and why.
    """
    config = transformer_config(model, mesh.layout, precision)
    kinds = parse_pattern(model.pattern, model.num_layers)
    sp_algorithm, reasons = _sp_algorithm(model, mesh, seq_len=seq_len, row_tokens=row_tokens)
    chunks = pipeline_chunks(model, mesh.layout, seq_len=seq_len)
    built = []
    for chunk in stage_chunks(chunks, mesh.pp_rank, pp=mesh.layout.pp):
        built.append(
            HybridModel(
                config,
                model,
                kinds,
                layers=chunk.layers,
                groups=mesh.groups,
                recompute=recompute,
                sp_algorithm=sp_algorithm,
                experts=experts,
            )
        )
        built[-1].sp_choices = reasons
    return built


def build_layer(model: ModelConfig, mesh: Mesh, index: int, *, precision: Precision, seq_len: int) -> DecoderLayer:
    """One layer of the model by its 0-based index, without the others; weights are uninitialized. See build_chunks."""
    sp_algorithm, _ = _sp_algorithm(model, mesh, seq_len=seq_len, row_tokens=seq_len)
    return DecoderLayer(
        transformer_config(model, mesh.layout, precision),
        parse_pattern(model.pattern, model.num_layers)[index],
        index=index,
        model=model,
        groups=mesh.groups,
        recompute=Recompute.none,
        sp_algorithm=sp_algorithm,
        experts=PLAIN,
    )


def _sp_algorithm(model: ModelConfig, mesh: Mesh, *, seq_len: int, row_tokens: int | None):
    """How each kind of mixer works over sp ranks, and why: see choose."""
    return choose(
        mesh.layout.sp_algorithm,
        {symbol for kind in parse_pattern(model.pattern, model.num_layers) for symbol in kind.mixers},
        num_heads=model.num_heads // mesh.layout.tp,
        num_kv_heads=model.num_kv_heads // mesh.layout.tp,
        head_dim=model.head_dim,
        window=model.window,
        seq_len=seq_len,
        row_tokens=row_tokens,
        group=mesh.groups.cp,
        device=mesh.device,
    )


def global_parameters(*chunks: HybridModel) -> dict[str, Tensor]:
    """This rank's parameters by the name they have in the whole model: layer indices are global."""
    return _global(chunks, lambda model: model.named_parameters())


def global_buffers(*chunks: HybridModel) -> dict[str, Tensor]:
    """The same of this rank's buffers, such as the routers' balancing biases."""
    return _global(chunks, lambda model: model.named_buffers())


def _global(
    chunks: Iterable[HybridModel], named_in: Callable[[HybridModel], Iterable[tuple[str, Tensor]]]
) -> dict[str, Tensor]:
    prefix, named = "decoder.layers.", {}
    for model in chunks:
        for name, tensor in named_in(model):
            if name.startswith(prefix):
                local, rest = name[len(prefix) :].split(".", 1)
                name = f"{prefix}{int(local) + model.decoder.first_layer}.{rest}"
            named[name] = tensor
    return named


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """Parameters of the whole model and those that one token meets, counted on a real build on the meta device.

    Tied weights count once; of the routed experts a token meets top_k.
    """
    with Mesh.build(Layout()) as mesh, on_meta():
        built = build_model(model, mesh, precision=Precision.bf16, seq_len=model.window)
    assert all(parameter.is_meta for parameter in built.parameters())
    total = sum(parameter.numel() for parameter in built.parameters())
    routed = [weight for layer in built.decoder.layers if layer.kind.moe for weight in layer.mlp.experts.parameters()]
    unmet = sum(len(weight) - model.moe.top_k for weight in routed[:1]) * sum(weight[0].numel() for weight in routed)
    return total, total - unmet

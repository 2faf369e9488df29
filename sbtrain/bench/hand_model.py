"""The peer: the same model assembled by hand in plain torch, as an expert would for one GPU without a framework.

It shares nothing with sbtrain.model but the shape, so equal losses are also a check of the engine. No tensor, pipeline
or sequence parallelism, no packed documents: B rows of T tokens, each one document.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sbtrain.bench.hand_kernels import Kernels
from sbtrain.config.pattern import parse_pattern
from sbtrain.config.schema import ModelConfig, Recompute


def rotary_table(model: ModelConfig, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [T,1,head_dim/2]. Raises ValueError for a scaled rotary embedding."""
    if model.rope_scaling is not None:
        raise ValueError("peers=hand knows no rope_scaling; use a model without it, or peers=engine")
    channels = torch.arange(0, model.head_dim, 2, device=device, dtype=torch.float64)
    angle = torch.arange(seq_len, device=device)[:, None] * model.rope_theta ** (-channels / model.head_dim)
    return angle.cos().float()[:, None], angle.sin().float()[:, None]


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x [B,T,H,D] turned by its positions, in fp32."""
    cos, sin = rotary
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Norm(nn.Module):
    """RMSNorm in fp32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class Softmax(nn.Module):
    """Full or sliding-window attention. qkv holds all query rows, then all key rows, then all value rows."""

    def __init__(self, model: ModelConfig, attend):
        super().__init__()
        self.head_dim, self.attend = model.head_dim, attend
        self.rows = [n * model.head_dim for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
        self.qkv = nn.Linear(model.hidden_size, sum(self.rows), bias=model.qkv_bias)
        self.proj = nn.Linear(self.rows[0], model.hidden_size, bias=False)
        self.q_norm = Norm(model.head_dim, model.norm_eps) if model.qk_norm else nn.Identity()
        self.k_norm = Norm(model.head_dim, model.norm_eps) if model.qk_norm else nn.Identity()

    def heads(self, x: Tensor, rotary) -> tuple[Tensor, ...]:
        """x [B,T,hidden] -> what mix takes."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(x).split(self.rows, -1))
        return rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary), v

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B,T,H,D] -> [B,T,Hq,D]."""
        return self.attend(q, k, v)

    def out(self, o: Tensor) -> Tensor:
        """[B,T,Hq,D] -> [B,T,hidden]."""
        return self.proj(o.flatten(2))


class GLA(nn.Module):
    """Gated linear attention; keys, values and decays are repeated to the query heads, as its public kernels want."""

    def __init__(self, model: ModelConfig, kernel):
        super().__init__()
        self.head_dim, self.group, self.kernel = model.head_dim, model.num_heads // model.num_kv_heads, kernel
        self.normalizer = model.gla.gate_normalizer
        self.rows = [n * model.head_dim for n in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
        self.qkv = nn.Linear(model.hidden_size, sum(self.rows), bias=model.qkv_bias)
        self.proj = nn.Linear(self.rows[0], model.hidden_size, bias=False)
        self.gate_down = nn.Linear(model.hidden_size, model.gla.gate_rank, bias=False)
        self.gate_up = nn.Linear(model.gla.gate_rank, self.rows[1])
        self.out_norm = Norm(model.head_dim, model.norm_eps)

    def heads(self, x: Tensor, rotary) -> tuple[Tensor, ...]:
        """x [B,T,hidden] -> what mix takes; rotary is not used."""
        log_decay = F.logsigmoid(self.gate_up(self.gate_down(x)).float()) / self.normalizer
        parts = (*self.qkv(x).split(self.rows, -1), log_decay)
        q, k, v, log_decay = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return q.relu(), self._repeat(k.relu()), self._repeat(v), self._repeat(log_decay)

    def _repeat(self, x: Tensor) -> Tensor:
        return x[:, :, :, None].expand(-1, -1, -1, self.group, -1).flatten(2, 3)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        """[B,T,Hq,D] each -> [B,T,Hq,D]."""
        return self.kernel(q, k, v, log_decay)

    def out(self, o: Tensor) -> Tensor:
        """[B,T,Hq,D] -> [B,T,hidden]."""
        return self.proj(self.out_norm(o).flatten(2))


class Layer(nn.Module):
    """x += mixer(norm(x)); x += ffn(norm(x)). Flat, so that torch.compile fuses across the norms and residuals."""

    def __init__(self, model: ModelConfig, mixer: nn.Module, recompute: Recompute):
        super().__init__()
        self.recompute_ffn = recompute is Recompute.selective
        self.norm_1, self.mixer = Norm(model.hidden_size, model.norm_eps), mixer
        self.norm_2 = Norm(model.hidden_size, model.norm_eps)
        self.gate_up = nn.Linear(model.hidden_size, 2 * model.ffn_size, bias=False)
        self.down = nn.Linear(model.ffn_size, model.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        mixed = self.mixer.mix(*self.mixer.heads(self.norm_1(x), rotary))
        x = x + self.mixer.out(mixed)
        ffn = checkpoint(self._ffn, x, use_reentrant=False) if self.recompute_ffn else self._ffn(x)
        return x + ffn

    def _ffn(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm_2(x)).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class HandModel(nn.Module):
    """Uninitialized: load() every parameter by its global name."""

    def __init__(self, model: ModelConfig, kernels: Kernels, *, seq_len: int, recompute: Recompute, device):
        super().__init__()
        self.config, self.kernels, self.recompute_layers = model, kernels, recompute is Recompute.full
        self.rotary = rotary_table(model, seq_len, device)
        self.embedding = nn.Parameter(torch.empty(model.vocab_size, model.hidden_size))
        symbols = [kind.mixers[0] for kind in parse_pattern(model.pattern, model.num_layers)]
        self.layers = nn.ModuleList(Layer(model, self._mixer(symbol), recompute) for symbol in symbols)
        self.norm = Norm(model.hidden_size, model.norm_eps)
        self.head = self.embedding if model.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding))

    def _mixer(self, symbol: str) -> nn.Module:
        if symbol == "L":
            return GLA(self.config, self.kernels.gla)
        return Softmax(self.config, {"F": self.kernels.full, "S": self.kernels.window}[symbol])

    def compile_layers(self) -> None:
        """torch.compile every layer by itself; layers of one kind share what is compiled."""
        for module in (*self.layers, self.norm):
            module.compile(dynamic=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """tokens, labels int64 [B,T] -> mean loss over the labels that are scored, nats, fp32."""
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            if self.recompute_layers:
                x = checkpoint(layer, x, self.rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, self.rotary)
        return self.kernels.loss(self.norm(x).flatten(0, 1), self.head, labels.flatten())

    @torch.no_grad()
    def load(self, name: str, tensor: Tensor) -> None:
        """Copy a parameter of the engine, given whole under its global name, into its place here."""
        if name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            tensor = self._split_groups(tensor)
        target = self.get_parameter(place(name))
        target.copy_(tensor[: target.shape[0]])  # without the padding of the vocabulary

    def _split_groups(self, rows: Tensor) -> Tensor:
        """Group-major q, k, v rows -> all q, all k, all v."""
        heads = rows.unflatten(0, (self.config.num_kv_heads, -1, self.config.head_dim))
        return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in (heads[:, :-2], heads[:, -2], heads[:, -1])])


_PLACES = {
    "embedding.word_embeddings.weight": "embedding",
    "output_layer.weight": "head",
    "decoder.final_layernorm.weight": "norm.weight",
    "self_attention.linear_qkv": "mixer.qkv",
    "self_attention.linear_proj": "mixer.proj",
    "self_attention": "mixer",
    "input_layernorm": "norm_1",
    "pre_mlp_layernorm": "norm_2",
    "mlp.linear_fc1": "gate_up",
    "mlp.linear_fc2": "down",
}


def place(name: str) -> str:
    """The parameter of HandModel that holds the engine's parameter of this global name."""
    if name in _PLACES:
        return _PLACES[name]
    layer, inside = re.fullmatch(r"decoder\.(layers\.\d+)\.(.*)", name).groups()
    start = next(prefix for prefix in _PLACES if inside.startswith(f"{prefix}."))
    return f"{layer}.{_PLACES[start]}{inside[len(start) :]}"

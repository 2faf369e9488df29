"""Mixture-of-experts FFNs: their parameters in checkpoints, and how a dense FFN becomes one (upcycling).

Every routed and every shared expert starts as a copy of the dense FFN, all three of its matrices times

    alpha = (S + w)^(-1/3)          S shared experts, w the sum of a token's routing weights that is expected at start

The gated FFN down(silu(gate x) * up x) is nearly of degree 3 in its matrices, so each copy puts out nearly alpha^3 of
the dense FFN, and S + w of them add up to it (SpikingBrain report, equation 18). A new router is near zero, hence w is

    softmax                 k / N     of N routed experts k are chosen, each with a weight of nearly 1 / N
    sigmoid                 k / 2     each with a weight of nearly sigmoid(0)
    either, renormalized    1

The choice favors the larger weights, and silu is not homogeneous: `sbtrain.convert.upcycle_check` measures what is
left. An expert is read by the rank that holds it, one source tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sbtrain.config.model_schema import ModelConfig, MoEConfig, RouterScore
from sbtrain.convert.mapping import WHOLE, Direct, Fill, GateUp, Mapping, Part, Reader, Source, check_shape

HALVES = ("gate", "up")


def expected_weight(moe: MoEConfig) -> float:
    """Sum of a token's routing weights under a router of zeros."""
    if moe.renormalize:
        return 1.0
    return moe.top_k * (1 / moe.num_experts if moe.score is RouterScore.softmax else 0.5)


def alpha_of(moe: MoEConfig) -> float:
    """What every matrix of an upcycled expert is multiplied with."""
    return (moe.num_shared_experts + expected_weight(moe)) ** (-1 / 3)


def ffn_rows(ours: str, theirs: str, model: ModelConfig, *, moe: bool, from_dense: bool) -> list[Mapping]:
    """Mappings of one layer's FFN. ours, theirs: prefixes of its names. from_dense: the sources are a dense FFN's.

    Raises ValueError where a dense FFN cannot become the experts.
    """
    if not moe:
        return _gated(ours, theirs, model.ffn_size, model)
    width = model.moe.expert_ffn_size or model.ffn_size
    if from_dense and width != model.ffn_size:
        raise ValueError(
            f"model.moe.expert_ffn_size={width} is not the dense FFN's {model.ffn_size}, which every expert "
            "starts as a copy of; set it to null"
        )
    router = _router(ours, theirs, model)
    if from_dense:
        return [*router[:1], *_upcycled(ours, theirs, model, width)]
    return [*router, *_own(ours, theirs, model, width)]


def _router(ours: str, theirs: str, model: ModelConfig) -> list[Mapping]:
    """Its weight and, where it balances by one, the bias that choices see."""
    shape = (model.moe.num_experts, model.hidden_size)
    weight = Source(f"{theirs}.router.weight", shape)
    rows: list[Mapping] = [Direct(f"{ours}.router.weight", shape, (weight,), new=True, std=model.moe.router_init_std)]
    if model.moe.bias_update_rate > 0:
        bias = Source(f"{theirs}.router.expert_bias", shape[:1])
        rows.append(Direct(f"{ours}.router.expert_bias", bias.shape, (bias,), fill=Fill.bias, new=True, buffer=True))
    return rows


def _gated(ours: str, theirs: str, ffn: int, model: ModelConfig) -> list[Mapping]:
    gate, up, down = _sources(theirs, ffn, model)
    return [
        GateUp(f"{ours}.linear_fc1.weight", (2 * ffn, model.hidden_size), (gate, up), 0),
        Direct(f"{ours}.linear_fc2.weight", (model.hidden_size, ffn), (down,), 1),
    ]


def _own(ours: str, theirs: str, model: ModelConfig, width: int) -> list[Mapping]:
    """Experts under the names of our exports: a tensor for each matrix of each expert, shared ones side by side."""
    shapes, moe = _shapes(model, width), model.moe
    experts = [_sources(f"{theirs}.experts.{j}", width, model) for j in range(moe.num_experts)]
    halves = tuple(source for gate, up, _ in experts for source in (gate, up))
    rows: list[Mapping] = [
        Experts(f"{ours}.experts.linear_fc1", shapes[0], halves, 0),
        Experts(f"{ours}.experts.linear_fc2", shapes[1], tuple(down for _, _, down in experts), 0),
    ]
    if moe.num_shared_experts:
        rows += _gated(f"{ours}.shared_experts", f"{theirs}.shared_expert", moe.num_shared_experts * width, model)
    return rows


def _upcycled(ours: str, theirs: str, model: ModelConfig, width: int) -> list[Mapping]:
    (gate, up, down), shapes, alpha = _sources(theirs, width, model), _shapes(model, width), alpha_of(model.moe)
    shared, hidden = model.moe.num_shared_experts * width, model.hidden_size
    rows: list[Mapping] = [
        Upcycled(f"{ours}.experts.linear_fc1", shapes[0], (gate, up), 0, alpha=alpha),
        Upcycled(f"{ours}.experts.linear_fc2", shapes[1], (down,), 0, alpha=alpha),
    ]
    if shared:
        fc1, fc2 = f"{ours}.shared_experts.linear_fc1.weight", f"{ours}.shared_experts.linear_fc2.weight"
        rows += [
            Repeated(fc1, (2 * shared, hidden), (gate, up), 0, alpha=alpha),
            Repeated(fc2, (hidden, shared), (down,), 1, alpha=alpha),
        ]
    return rows


def _sources(theirs: str, ffn: int, model: ModelConfig) -> tuple[Source, Source, Source]:
    gate, up = (Source(f"{theirs}.{half}_proj.weight", (ffn, model.hidden_size)) for half in HALVES)
    return gate, up, Source(f"{theirs}.down_proj.weight", (model.hidden_size, ffn))


def _shapes(model: ModelConfig, width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    num, hidden = model.moe.num_experts, model.hidden_size
    return (num, 2 * width, hidden), (num, hidden, width)


@dataclass(frozen=True)
class Experts(Mapping):
    """One matrix of all routed experts, [E, rows, columns], cut along E by expert parallelism; sources by expert."""

    def cut(self, part: Part) -> tuple[int, int, str]:
        """See Mapping."""
        return part.ep_rank, part.ep, "ep"

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts of the first expert held, then those of the next: gate and up, or down."""
        num_parts = len(self.sources) // self.shape[0]
        return tuple(view for expert in tensor for view in expert.chunk(num_parts))

    def copy_into(self, local: Tensor, reader: Reader, part: Part = WHOLE) -> None:
        """See Mapping; reads the experts that this rank holds and no other."""
        first = part.ep_rank * local.shape[0] * len(self.sources) // self.shape[0]
        for source, view in zip(self.sources[first:], self.views(local)):
            check_shape(source, reader)
            view.copy_(reader.get(source.name))

    def draw_into(self, local: Tensor, draw: Callable[[str, tuple[int, ...]], Tensor], part: Part = WHOLE) -> None:
        """See Mapping; expert by expert, each under a name of its own."""
        for j, expert in enumerate(local, start=part.ep_rank * local.shape[0]):
            expert.copy_(draw(f"{self.name}.{j}", self.shape[1:]))

    def shard_into(self, local: Tensor, whole: Tensor, part: Part = WHOLE) -> None:
        """See Mapping."""
        local.copy_(whole.narrow(0, part.ep_rank * local.shape[0], local.shape[0]))


@dataclass(frozen=True)
class Upcycled(Experts):
    """Every expert is the dense FFN's sources, above one another, times alpha."""

    alpha: float = 1.0

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[experts held, rows, columns] for each source."""
        return tensor.chunk(len(self.sources), dim=1)

    def copy_into(self, local: Tensor, reader: Reader, part: Part = WHOLE) -> None:
        """See Mapping; multiplies in fp32."""
        for source, view in zip(self.sources, self.views(local)):
            check_shape(source, reader)
            scaled = reader.get(source.name).float().mul_(self.alpha)
            for expert in view:
                expert.copy_(scaled)


@dataclass(frozen=True)
class Repeated(Mapping):
    """Shared experts side by side: the dense FFN's channels over and over, times alpha, cut by tensor parallelism."""

    alpha: float = 1.0

    @property
    def unit(self) -> int:
        """One row of each source."""
        return len(self.sources) if self.cut_dim == 0 else 1

    def views(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """[channels held, D] of gate and up, or [D, channels held]."""
        return tensor.chunk(len(self.sources))

    def copy_into(self, local: Tensor, reader: Reader, part: Part = WHOLE) -> None:
        """See Mapping; multiplies in fp32."""
        dim = self.cut_dim
        for source, view in zip(self.sources, self.views(local)):
            check_shape(source, reader)
            channels, held, done = source.shape[dim], view.shape[dim], 0
            while done < held:
                start = (part.tp_rank * held + done) % channels
                num = min(channels - start, held - done)
                piece = reader.get_slice(source.name, dim, start, start + num)
                view.narrow(dim, done, num).copy_(piece.float() * self.alpha)
                done += num

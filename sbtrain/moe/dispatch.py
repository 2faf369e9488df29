"""Rows to their experts and back: by sorting and gathering, without a wait for the device but for the split sizes.

megatron's unfused dispatcher waits four times a layer and adds rows with float atomics; this one makes the same
exchange with one wait, and its backward pass gathers what the forward pass scattered, in a fixed order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.expert import Fetched, gather_counts
from sbtrain.moe.router import count_choices


@dataclass(frozen=True)
class Limits:
    """What an expert may take of a rank's tokens in one forward pass.

    capacity_factor: times its even share, 0 for all. align: its rows become a multiple of this. drop: by dropping the
    rest of each rank's rows; otherwise by rows of zeros where the expert is.
    """

    capacity_factor: float = 0.0
    align: int = 1
    drop: bool = False

    @property
    def drops(self) -> bool:
        """Whether choices may be dropped."""
        return self.capacity_factor > 0 or (self.drop and self.align > 1)


@dataclass(frozen=True)
class Departure:
    """How the choices of a rank's T tokens, k each, leave their places, known without a wait unless some are dropped.

    order: int64 [S + H], the choice (token * k + j) of each row that leaves, sorted by expert; the last H rows go to
    copies of hot experts on this rank. place: int64 [T, k], the row of each choice among those, -1 dropped. partial:
    choices may be dropped.
    """

    order: Tensor
    place: Tensor
    partial: bool


@dataclass(frozen=True)
class Plan:
    """Where they go.

    send, receive: rows for and from each ep rank, S and R in all. offsets: int32 [L + 1] bounds of the local experts'
    rows. by_expert: int64 [R'], the received row at each place of the local experts' order, -1 is a row of zeros; None
    where they arrive in order. places: int64 [R], its inverse. hot_offsets: int32 [num_hot + 1]. observed: int64, the
    rows of the local experts' order that observers of their neuron count, None is all.
    """

    send: list[int]
    receive: list[int]
    offsets: Tensor
    by_expert: Tensor | None
    places: Tensor | None
    hot_offsets: Tensor | None
    padded: bool
    observed: Tensor | None = None


class Counts:
    """Rows that leave for each expert and each copy of a hot one.

    own: int64 [N] of this rank. table: int64 [ranks, N] of all. dropped: choices of this rank that leave for none, on
    the device; None where none can be.
    """

    def __init__(self, own: Tensor, table: Tensor, dropped: Tensor | None):
        self.own, self.table, self.dropped = own, table, dropped
        self._fetched: Fetched | None = None

    def fetch(self) -> None:
        """Send the table to the host."""
        self._fetched = Fetched(self.table)

    @property
    def rows(self) -> list[list[int]] | None:
        """The table on the host, None if it was not sent there: the one wait for the device."""
        return None if self._fetched is None else self._fetched.tolist()


class Dispatcher:
    """Makes plans for one layer: num_experts over the ranks of the expert-parallel group."""

    def __init__(self, num_experts: int, *, limits: Limits, group):
        self.num_experts, self.limits, self.group = num_experts, limits, group
        self.num_local = num_experts // group.size()
        self.first_local = group.rank() * self.num_local

    def begin(
        self, experts: Tensor, weights: Tensor, counted: Tensor, hot: tuple[int, ...] = ()
    ) -> tuple[Departure, Counts]:
        """experts int64, weights fp32 [T, k]; counted bool [T]: others are never dropped. Collective over the group.

        hot: experts of which every rank has a copy.
        """
        num_choices, num_hot = experts.numel(), len(hot)
        keys = self._with_copies(experts.flatten(), hot)
        dropped = None
        if self.limits.drops and num_choices:
            kept = self._within_limits(experts, weights.detach(), counted)
            keys = torch.where(kept, keys, self.num_experts + num_hot)
            dropped = (~kept).sum()
        own = count_choices(keys[:, None], self.num_experts + num_hot)
        counts = Counts(own, gather_counts(own, group=self.group), dropped)
        if self.group.size() > 1 or self.limits.drops or self._pads:
            counts.fetch()
        order = keys.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(num_choices, device=order.device))
        if self.limits.drops:
            num_kept = sum(counts.rows[self.group.rank()])
            order, place = order[:num_kept], torch.where(place < num_kept, place, -1)
        return Departure(order, place.view(experts.shape), self.limits.drops), counts

    def plan(self, counts: Counts, num_choices: int) -> Plan:
        """The rest for what begin has counted of num_choices; waits for it to reach the host, if it has to."""
        rows, num_hot = counts.rows, len(counts.own) - self.num_experts
        send, receive = ([num_choices], [num_choices]) if rows is None else self._splits(rows)
        local = slice(self.first_local, self.first_local + self.num_local)
        offsets, by_expert, places = self._sort_arrivals(counts.table[:, local], rows, local, sum(receive))
        return Plan(
            send=send,
            receive=receive,
            offsets=offsets,
            by_expert=by_expert,
            places=places,
            hot_offsets=_bounds(counts.own[self.num_experts :]) if num_hot else None,
            padded=self._pads,
        )

    @property
    def _pads(self) -> bool:
        return self.limits.align > 1 and not self.limits.drop

    def _with_copies(self, keys: Tensor, hot: tuple[int, ...]) -> Tensor:
        """Choices of a hot expert stay here, behind all others, unless the expert itself is here."""
        for slot, expert in enumerate(hot):
            if not self.first_local <= expert < self.first_local + self.num_local:
                keys = torch.where(keys == expert, self.num_experts + slot, keys)
        return keys

    def _within_limits(self, experts: Tensor, weights: Tensor, counted: Tensor) -> Tensor:
        """bool [T * k]: the choices that stay, those of greatest weight first."""
        flat, top_k = experts.flatten(), experts.shape[1]
        by_weight = weights.flatten().argsort(descending=True, stable=True)
        order = by_weight[flat[by_weight].argsort(stable=True)]
        is_counted = counted.repeat_interleave(top_k)[order]
        sizes = count_choices(experts, self.num_experts)
        free = sizes - count_choices(experts, self.num_experts, counted)
        limit = sizes - free
        if self.limits.capacity_factor > 0:
            # the even share of the counted choices, on the device
            even = counted.sum() * top_k * self.limits.capacity_factor / self.num_experts
            limit = torch.minimum(limit, even.ceil().long())
        if self.limits.drop and self.limits.align > 1:
            limit = ((free + limit) // self.limits.align * self.limits.align - free).clamp(min=0)
        running = is_counted.cumsum(0)
        before = torch.cat([running.new_zeros(1), running])[sizes.cumsum(0) - sizes]
        mine = flat[order]
        stays = ~is_counted | (running - before[mine] <= limit[mine])
        return torch.empty_like(stays).scatter_(0, order, stays)

    def _splits(self, rows: list[list[int]]) -> tuple[list[int], list[int]]:
        mine, size = rows[self.group.rank()], self.num_local
        send = [sum(mine[rank * size : (rank + 1) * size]) for rank in range(self.group.size())]
        local = slice(self.first_local, self.first_local + size)
        return send, [sum(row[local]) for row in rows]

    def _sort_arrivals(self, table: Tensor, rows: list | None, local: slice, num_rows: int):
        """offsets, by_expert and places of a plan; table int64 [ranks, L] of rows that arrive, by rank and expert."""
        sizes = table.sum(0)
        if not self._pads and (self.num_local == 1 or self.group.size() == 1):
            return _bounds(sizes), None, None
        names = torch.arange(self.num_local, device=table.device).repeat(len(table))
        names = names.repeat_interleave(table.flatten(), output_size=num_rows)
        by_expert = names.argsort(stable=True)
        if not self._pads:
            places = torch.empty_like(by_expert).scatter_(0, by_expert, torch.arange(num_rows, device=table.device))
            return _bounds(sizes), by_expert, places
        align = self.limits.align
        padded = (sizes + align - 1) // align * align
        num_padded = sum(math.ceil(sum(row[e] for row in rows) / align) * align for e in range(local.start, local.stop))
        shift = (padded - sizes).cumsum(0) - (padded - sizes)
        target = torch.arange(num_rows, device=table.device) + shift[names[by_expert]]
        spaced = torch.full((num_padded,), -1, dtype=torch.int64, device=table.device).scatter_(0, target, by_expert)
        places = torch.empty_like(by_expert).scatter_(0, by_expert, target)
        return _bounds(padded), spaced, places


def _bounds(sizes: Tensor) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32)


class _Depart(torch.autograd.Function):
    """rows[i] = x[order[i] // k]; the gradient of a token is the sum over its places, in the order of its choices."""

    @staticmethod
    def forward(ctx, x: Tensor, departure: Departure) -> Tensor:
        ctx.departure = departure
        return x.index_select(0, departure.order // departure.place.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        first, *others = ctx.departure.place.unbind(1)
        total = _rows_or_zeros(grad, first, ctx.departure.partial)
        if others:
            total = total.to(torch.promote_types(grad.dtype, torch.float32))
        for column in others:
            total += _rows_or_zeros(grad, column, ctx.departure.partial)
        return total.to(grad.dtype), None


class _Combine(torch.autograd.Function):
    """out[t] = sum over j of weights[t, j] * y[place[t, j]], summed in weights' dtype; dropped choices add nothing."""

    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, departure: Departure) -> Tensor:
        ctx.departure = departure
        ctx.save_for_backward(y, weights)
        first, *others = departure.place.unbind(1)
        rows = _rows_or_zeros(y, first, departure.partial)
        if not others:
            return torch.mul(rows, weights, out=torch.empty_like(rows))  # rounds once, without a copy in fp32
        total = rows * weights[:, :1]
        for j, column in enumerate(others, 1):
            total += _rows_or_zeros(y, column, departure.partial) * weights[:, j : j + 1]
        return total.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (y, weights), departure = ctx.saved_tensors, ctx.departure
        grads = grad.index_select(0, departure.order // departure.place.shape[1])
        of_rows = weights.flatten().index_select(0, departure.order)[:, None]
        grad_y = torch.mul(grads, of_rows, out=torch.empty_like(y))
        grad_weights = torch.zeros_like(weights).flatten()
        grad_weights.scatter_(0, departure.order, (y.to(weights.dtype) * grads).sum(-1).to(weights.dtype))
        return grad_y, grad_weights.view_as(weights), None


def _rows_or_zeros(x: Tensor, index: Tensor, partial: bool) -> Tensor:
    """x[index], zeros where the index is -1 (only if partial)."""
    if not partial:
        return x.index_select(0, index)
    if not len(x):
        return x.new_zeros(len(index), x.shape[1])
    return torch.where((index >= 0)[:, None], x.index_select(0, index.clamp(min=0)), 0)


class _Sort(torch.autograd.Function):
    """Received rows -> the local experts' order, and back; each is the other's transpose."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, inverse: Tensor, gaps: tuple[bool, bool]) -> Tensor:
        ctx.index, ctx.inverse, ctx.gaps = index, inverse, gaps
        return _rows_or_zeros(x, index, gaps[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _rows_or_zeros(grad, ctx.inverse, ctx.gaps[1]), None, None, None


def leave(x: Tensor, departure: Departure) -> Tensor:
    """x [T, D] -> rows [S + H, D] sorted by where they go."""
    return _Depart.apply(x, departure)


def arrive(received: Tensor, plan: Plan) -> Tensor:
    """Received rows [R, D] -> in the order of the local experts [R', D]."""
    if plan.by_expert is None:
        return received
    return _Sort.apply(received, plan.by_expert, plan.places, (plan.padded, False))


def observed(plan: Plan, departure: Departure, counted: Tensor | None) -> Plan:
    """The plan with the rows that observers count: none that only fill up an expert's share.

    counted: bool [T], tokens whose rows count, where all rows are of this rank; waits for the device. None is all.
    """
    if counted is None:
        return replace(plan, observed=plan.places.sort().values) if plan.padded else plan
    rows = counted[departure.order // departure.place.shape[1]].nonzero()[:, 0]
    return replace(plan, observed=rows if plan.places is None else plan.places[rows].sort().values)


def send_back(y: Tensor, plan: Plan) -> Tensor:
    """The local experts' rows [R', D] -> in the order in which they came [R, D]."""
    if plan.by_expert is None:
        return y
    return _Sort.apply(y, plan.places, plan.by_expert, (False, plan.padded))


def come_home(rows: Tensor, weights: Tensor, departure: Departure) -> Tensor:
    """Rows [S + H, D] of the experts' outputs, weights fp32 [T, k] -> tokens [T, D], in the rows' dtype."""
    return _Combine.apply(rows, weights, departure)

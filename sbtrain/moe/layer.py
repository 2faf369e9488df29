"""The mixture-of-experts FFN: route, send rows to their experts, compute, bring them home; shared experts meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel import mcore
from parallel.expert import Exchange
from parallel.recompute import is_replay, recomputed
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.moe_schema import Align, ExpertsConfig
from sbtrain.config.schema import Recompute
from sbtrain.moe.dispatch import Departure, Dispatcher, Limits, Plan, arrive, come_home, leave, observed, send_back
from sbtrain.moe.experts import Experts, SharedExperts, grouped_ffn
from sbtrain.moe.hot import HotExperts
from sbtrain.moe.router import Router
from sbtrain.spiking.neuron import Sites


class MoELayer(mcore.MegatronModule):
    """y = sum over the top_k experts e of a token of p_e E_e(x), plus the shared experts (report, section 2.2, eq. 7).

    Experts are spread over the ep ranks; their FFNs are not cut by tp, tokens are: each tp rank routes its part.
    """

    def __init__(
        self, config, *, model: ModelConfig, groups, recompute: Recompute, options: ExpertsConfig, sites: Sites
    ):
        super().__init__(config)
        moe, self.groups = model.moe, groups
        self.recompute, self.options = recompute, options
        ffn_size = moe.expert_ffn_size or model.ffn_size
        self.router = Router(config, moe=moe, groups=groups)
        self.experts = Experts(config, num_experts=moe.num_experts, ffn_size=ffn_size, groups=groups)
        self.shared_experts = None
        if moe.num_shared_experts:
            about = dict(groups=groups, neuron=sites.neuron("down", cut=True))
            self.shared_experts = SharedExperts(config, ffn_size=moe.num_shared_experts * ffn_size, **about)
        self.spiked_input, self.spiked_active = sites.neuron("gate_up"), sites.neuron("down")
        limits = Limits(moe.capacity_factor, options.align_tokens, options.align is Align.drop)
        self.dispatcher = Dispatcher(moe.num_experts, limits=limits, group=groups.ep)
        self.without_limits = Dispatcher(moe.num_experts, limits=Limits(), group=groups.ep)
        self.hot = HotExperts(self.experts, num_experts=moe.num_experts, options=options, group=groups.ep)
        none = torch.zeros(moe.num_experts, dtype=torch.uint8, device=torch.cuda.current_device())
        self.register_buffer("hot_experts", none)  # those of the next step, so that a resumed run has the same

    def choose_hot(self, load: list[float]) -> None:
        """Choose the experts to be copied in the next step. load: of each expert in this one, over the even share."""
        self.hot.choose(load)
        flags = [expert in self.hot.chosen for expert in range(len(load))]
        self.hot_experts.copy_(torch.tensor(flags, dtype=torch.uint8))

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.hot.take_over(self.hot_experts.nonzero().flatten().tolist())

    def forward(self, x: Tensor, num_meta: int = 0) -> Tensor:
        """x [T,1,D] -> [T,1,D]. Losses, limits and statistics leave out its first num_meta rows.

        Limits are training's: elsewhere what a token gets must not depend on the tokens behind it.
        """
        rows, counted = self._own_rows(x, num_meta)
        weights, experts = self._route(rows, counted)
        hot, dispatcher = (self.hot.active, self.dispatcher) if self.training else ((), self.without_limits)
        departure, counts = dispatcher.begin(experts, weights, counted, hot)
        if counts.dropped is not None and self._counts:
            self.router.tally.add_dropped(counts.dropped)
        seen = rows if self.spiked_input is None else self.spiked_input(rows)  # the router sees the rows as they are
        sent = leave(seen, departure)  # before the wait, so that the device has something to do
        plan = self._observed(dispatcher.plan(counts, experts.numel()), departure, counted)
        if self.shared_experts is not None:
            x = self._seen_by_all(x, seen)
        out, shared = self._exchange(sent, x, plan, hot) if self.groups.ep.size() > 1 else self._alone(sent, x, plan)
        return self._joined(come_home(out, weights, departure), len(x)) + (0 if shared is None else shared)

    @property
    def _counts(self) -> bool:
        return self.training and self.router.step_tokens is not None and not is_replay()

    @property
    def _deals(self) -> bool:
        """Whether all tp ranks are given the same rows, and each routes a part of them."""
        return self.groups.tp.size() > 1 and not self.config.sequence_parallel

    def _own_rows(self, x: Tensor, num_meta: int) -> tuple[Tensor, Tensor]:
        """The rows that this tp rank routes [T', D], and which of them count, bool [T']."""
        tp, num_rows = self.groups.tp.size(), len(x)
        if not self._deals:
            index = torch.arange(num_rows, device=x.device)
            return x[:, 0], index >= num_meta
        padded = pad(x[:, 0], (0, 0, 0, -num_rows % tp))
        rows = mcore.scatter_to_sequence_parallel_region(padded, group=self.groups.tp)
        index = torch.arange(len(rows), device=x.device) + self.groups.tp.rank() * len(rows)
        return rows, (index >= num_meta) & (index < num_rows)

    def _joined(self, rows: Tensor, num_rows: int) -> Tensor:
        """The transpose of _own_rows: [T', D] of each tp rank -> [T,1,D]."""
        if self._deals:
            rows = mcore.gather_from_sequence_parallel_region(
                rows, tensor_parallel_output_grad=False, group=self.groups.tp
            )
        return rows[:num_rows, None]

    def _seen_by_all(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [T,1,D] as shared experts read it. seen: this tp rank's rows as routed ones do."""
        if self.spiked_input is None:
            return x
        return self.spiked_input(x) if self._deals else seen[:, None]

    def _route(self, rows: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        if self.recompute in (Recompute.activations, Recompute.selective) and torch.is_grad_enabled():
            return recomputed(self.router, rows, counted)
        return self.router(rows, counted)

    def _alone(self, sent: Tensor, x: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
        half = self._begin_shared(x)
        out = send_back(self._compute(arrive(sent, plan), plan), plan)
        return out, half and self.shared_experts.second_half(half)

    def _exchange(self, sent: Tensor, x: Tensor, plan: Plan, hot: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Over the ep ranks. Each half of the shared experts runs while rows travel."""
        num_sent = sum(plan.send)
        away = sent[:num_sent] if hot else sent
        there = Exchange(send=plan.send, receive=plan.receive, group=self.groups.ep, name="rows to experts")
        there.start(away)
        half = self._begin_shared(x)
        done = send_back(self._compute(arrive(there.wait(), plan), plan), plan)
        back = Exchange(send=plan.receive, receive=plan.send, group=self.groups.ep, name="rows from experts")
        back.start(done)
        shared = half and self.shared_experts.second_half(half)
        stayed = self._ffn(sent[num_sent:], self.hot.weights, plan.hot_offsets) if hot else None
        out = back.wait()
        return (out if stayed is None else torch.cat([out, stayed])), shared

    def _begin_shared(self, x: Tensor) -> tuple | None:
        if self.shared_experts is None:
            return None
        graph = torch.is_grad_enabled()
        return self.shared_experts.first_half(
            x,
            rebuild=graph and self.recompute is Recompute.activations,
            recompute=graph and self.recompute is Recompute.selective,
        )

    def _observed(self, plan: Plan, departure: Departure, counted: Tensor) -> Plan:
        """The plan with what an observer counts. Meta tokens are in it while training: leaving them out is a wait."""
        if self.spiked_active is None or self.spiked_active.observer is None:
            return plan
        without_meta = not self.training and self.groups.ep.size() == 1
        return observed(plan, departure, counted if without_meta else None)

    def _compute(self, rows: Tensor, plan: Plan) -> Tensor:
        weights = self.experts.linear_fc1, self.experts.linear_fc2
        return self._ffn(rows, weights, plan.offsets, plan.observed)

    def _ffn(
        self, rows: Tensor, weights: tuple[Tensor, Tensor], offsets: Tensor, observed: Tensor | None = None
    ) -> Tensor:
        """The FFNs of groups of rows, with as much kept for the backward pass as the recipe wants."""
        arguments = rows, *weights, offsets, self.spiked_active, observed
        if not torch.is_grad_enabled() or self.recompute is Recompute.full:
            return grouped_ffn(*arguments)
        overloaded = 0 < self.options.recompute_above_tokens < len(rows)
        if self.recompute is Recompute.selective or overloaded:
            return recomputed(grouped_ffn, *arguments)
        return grouped_ffn(*arguments, rebuild=self.recompute is Recompute.activations)

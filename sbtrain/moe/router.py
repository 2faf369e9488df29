"""The router: which experts a token goes to and with what weight, the losses that balance them, and what they got."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel import mcore
from parallel.recompute import is_replay
from sbtrain.config.model_schema import MoEConfig, RouterScore


class Router(mcore.MegatronModule):
    """Linear scores in fp32, the top_k experts of each token, and their weights (report, section 3.2, eq. 16 and 17).

    Two losses join the gradient of the mean cross-entropy, with N counted tokens in the global batch:
        aux_loss_coeff * E * sum_e f_e P_e, where P_e is the mean score of expert e over those N tokens (sigmoid scores
            are first divided by their sum) and f_e its share of the choices in a global batch: that of the step
            before, or the step's own if it is the first one or moe.exact_aux_loss (see ExpertSteps.lacks_load). f has
            no gradient in any case; known to all ranks before the first micro-batch, it makes the loss the same on
            every layout.
        z_loss_coeff * mean over those N tokens of log(sum_e exp logit_e)^2
    They are added per layer. Sources: Switch Transformer (arXiv 2101.03961, eq. 4), global batch: arXiv 2501.11873,
    z-loss: ST-MoE (arXiv 2202.08906, eq. 5), bias balancing: arXiv 2408.15664.
    """

    def __init__(self, config: mcore.TransformerConfig, *, moe: MoEConfig, groups):
        super().__init__(config)
        self.moe, self.num_experts, self._tp_group = moe, moe.num_experts, groups.tp
        place = torch.cuda.current_device()
        self.weight = nn.Parameter(
            torch.empty(moe.num_experts, config.hidden_size, dtype=config.params_dtype, device=place)
        )
        self.weight.is_new = True
        self.weight.sequence_parallel = config.sequence_parallel
        unknown = torch.zeros(moe.num_experts, dtype=torch.float32, device=place)
        self.register_buffer("load", unknown)
        if moe.bias_update_rate > 0:
            self.register_buffer("expert_bias", torch.zeros_like(unknown))
        self.tally = Tally(moe.num_experts, place)
        self.step_tokens: int | None = None
        self.forced: Tensor | None = None

    def forward(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], counted bool [T] (others: no losses, statistics) -> weights fp32 or fp64, experts int64 [T, k]."""
        weight = self.weight
        if self._tp_group.size() > 1 and not self.config.sequence_parallel:  # each tp rank routes a part of the tokens
            weight = mcore.copy_to_tensor_model_parallel_region(weight, group=self._tp_group)
        logits = _logits(x, weight)
        softmax = self.moe.score is RouterScore.softmax
        scores = logits.softmax(-1) if softmax else logits.sigmoid()
        experts = self._choose(scores.detach())
        weights = scores.gather(1, experts)
        if self.moe.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training and self.step_tokens is not None:
            shares = scores if softmax else scores / (scores.sum(-1, keepdim=True) + 1e-20)
            weights = self._with_losses(weights, logits, shares, counted)
            if not is_replay():
                self.tally.add(experts, shares.detach(), counted)
        return weights, experts

    def _choose(self, scores: Tensor) -> Tensor:
        if self.forced is not None:
            return forced_choice(self.forced, len(scores), self.moe.top_k)
        if self.moe.bias_update_rate > 0:
            scores = scores + self.expert_bias
        return scores.topk(self.moe.top_k, dim=-1).indices

    def _with_losses(self, weights: Tensor, logits: Tensor, shares: Tensor, counted: Tensor) -> Tensor:
        """The weights, whose backward pass also brings the gradients of the losses."""
        loss, mask, num_tokens = None, counted[:, None], max(self.step_tokens, 1)
        if self.moe.aux_loss_coeff > 0:
            scale = self.moe.aux_loss_coeff * self.num_experts / num_tokens
            loss = scale * ((shares * mask).sum(0) * self.load).sum()
        if self.moe.z_loss_coeff > 0:
            squares = logits.logsumexp(-1, keepdim=True).square() * mask
            z_loss = self.moe.z_loss_coeff / num_tokens * squares.sum()
            loss = z_loss if loss is None else loss + z_loss
        return weights if loss is None else mcore.MoEAuxLossAutoScaler.apply(weights, loss)

    @torch.no_grad()
    def end_step(self, totals: Tensor) -> None:
        """Take over the tally of the whole global batch: the next step's f, and the balancing bias."""
        self.take_load(totals)
        counts = totals[: self.num_experts]
        if self.moe.bias_update_rate > 0:
            self.expert_bias.add_(torch.sign(counts.mean() - counts), alpha=self.moe.bias_update_rate)

    @torch.no_grad()
    def take_load(self, totals: Tensor) -> None:
        """Take f from the tally of a whole global batch."""
        counts = totals[: self.num_experts]
        self.load.copy_(counts / counts.sum().clamp(min=1))


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, D], weight [E, D] -> fp32 or fp64 [T, E]."""
    exact = torch.promote_types(x.dtype, torch.float32)
    if len(x):
        return mcore.router_gating_linear(x, weight, None, exact)
    return nn.functional.linear(x.to(exact), weight.to(exact))  # megatron's cannot reshape nothing


class Tally:
    """What this rank's tokens did in a step, fp64 on the device: choices and score sums of each expert, drops.

    values: [choices of E experts | sums of their scores | dropped choices].
    """

    def __init__(self, num_experts: int, device):
        self.num_experts = num_experts
        self.values = torch.zeros(2 * num_experts + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, experts: Tensor, shares: Tensor, counted: Tensor) -> None:
        """experts int64 [T, k], shares [T, E] of the counted bool [T] tokens."""
        choices = count_choices(experts, self.num_experts, counted)
        self.values[: self.num_experts] += choices
        self.values[self.num_experts : -1] += (shares * counted[:, None]).sum(0)

    @torch.no_grad()
    def add_dropped(self, num_dropped: Tensor) -> None:
        """num_dropped: choices that were not carried out."""
        self.values[-1] += num_dropped

    def take(self) -> Tensor:
        """The values, which begin again from 0."""
        values, self.values = self.values, torch.zeros_like(self.values)
        return values


def count_choices(experts: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """How often each of num_experts occurs in experts [T, k] (of the counted [T] tokens), int64; no wait."""
    names = torch.arange(num_experts, device=experts.device)
    hits = experts[..., None] == names
    if counted is not None:
        hits = hits & counted[:, None, None]
    return hits.flatten(0, -2).sum(0)


def forced_choice(shares: Tensor, num_tokens: int, top_k: int) -> Tensor:
    """Experts int64 [T, k] that follow given shares [E] instead of scores: for benchmarks. Shares add up to 1.

    Tokens are spread over the experts in turn, so that every stretch of the row has about these shares.
    """
    golden = 0.6180339887498949  # a rotation by it is even over every stretch
    spread = (torch.arange(num_tokens, dtype=torch.float64, device=shares.device) * golden) % 1.0
    first = torch.searchsorted(shares.double().cumsum(0), spread, right=True).clamp(max=len(shares) - 1)
    return (first[:, None] + torch.arange(top_k, device=shares.device)) % len(shares)

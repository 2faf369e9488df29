"""What is compared: a training step of the engine, and the same step assembled by hand. Both start from equal weights.

A peer is built, stepped and closed; close() leaves nothing on the device. step(mark) runs one optimizer step on the
batch and returns (loss, gradient norm before clipping), numbers or tensors; metrics is what the model says of it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from parallel.engine import Engine
from parallel.layout import Layout
from parallel.mesh import Mesh, device
from parallel.sequence.shard import IGNORE, Row
from sbtrain.bench.hand_kernels import kernels_for
from sbtrain.bench.hand_model import HandModel
from sbtrain.bench.hand_optimizer import MasterAdamW
from sbtrain.bench.timing import Mark
from sbtrain.bench.weights import draw, global_shapes
from sbtrain.config.moe_schema import PLAIN, ExpertsConfig
from sbtrain.config.schema import ModelConfig, OptimConfig, Precision, Recompute
from sbtrain.model.build import build_model, global_parameters
from sbtrain.moe.router import Router

LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Work:
    """One step: the model, and on every data-parallel rank `rows` rows of micro_batch documents of seq_len tokens.

    experts: how mixtures of experts are run. forced: the share of tokens that each expert gets, None for the router's.
    """

    model: ModelConfig
    precision: Precision
    recompute: Recompute
    micro_batch: int
    seq_len: int
    layout: Layout = Layout()
    rows: int = 1
    experts: ExpertsConfig = PLAIN
    forced: list[float] | None = None

    def batch(self, number: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and labels int64 [documents, seq_len] on the CPU; the last token of each predicts nothing."""
        shape, generator = (self.micro_batch, self.seq_len), torch.Generator().manual_seed(number)
        tokens = torch.randint(self.model.vocab_size, shape, generator=generator)
        labels = tokens.roll(-1, 1)
        labels[:, -1] = IGNORE
        return tokens, labels

    def row(self, number: int = 0) -> Row:
        """A batch as the engine takes it: one row of packed documents."""
        tokens, labels = self.batch(number)
        edges = torch.arange(self.micro_batch + 1, dtype=torch.int32) * self.seq_len
        return Row(tokens.flatten(), labels.flatten(), edges)


class EnginePeer:
    """What training runs on the ranks of this world, the loader excluded. Collective in all that it does."""

    def __init__(self, work: Work):
        self.mesh, self.engine = Mesh.build(work.layout), None
        try:
            model = build_model(
                work.model,
                self.mesh,
                precision=work.precision,
                recompute=work.recompute,
                seq_len=work.seq_len,
                row_tokens=work.micro_batch * work.seq_len,
                experts=work.experts,
            )
            for part in model.modules() if work.forced is not None else ():
                if isinstance(part, Router):
                    part.forced = torch.tensor(work.forced, dtype=torch.float64, device=self.mesh.device)
            self.engine = Engine(model, self.mesh, adam=asdict(OptimConfig()))
            with torch.no_grad():
                for name, parameter in global_parameters(model).items():
                    parameter.copy_(draw(name, parameter.shape, parameter.device))
            self.engine.weights_changed()
        except BaseException:
            self.close()
            raise
        first = self.mesh.dp_rank * work.rows
        self.rows, self.sp_choices = [work.row(first + i) for i in range(work.rows)], model.sp_choices
        self.metrics: dict = {}

    def step(self, mark: Mark):
        """See the module."""
        with record_function("bench: forward and backward"):
            loss = self.engine.forward_backward(self.rows).mean
        mark("forward_backward")
        with record_function("bench: optimizer"):
            norm = self.engine.step(lr=LEARNING_RATE)
        mark("optimizer")
        self.metrics = self.engine.metrics
        return loss, norm

    def close(self) -> None:
        """See the module."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None
        self.mesh.close()


class HandPeer:
    """The same parts without a framework, on one rank."""

    sp_choices: dict[str, str] = {}
    metrics: dict = {}

    def __init__(self, work: Work):
        place = device()
        shapes = global_shapes(work.model)
        kernels = kernels_for(work.model, work.seq_len, place)
        with place:
            self.model = HandModel(
                work.model, kernels, seq_len=work.seq_len, recompute=work.recompute, device=place
            ).to(torch.bfloat16 if work.precision is Precision.bf16 else torch.float32)
        for name, shape in shapes.items():
            self.model.load(name, draw(name, shape, place))
        # torch has several attentions for one call, and the compiler decides for good: let it see the fastest only
        self.kernel_choice = nullcontext
        if place.type == "cuda":
            self.model.compile_layers()
            self.kernel_choice = lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
        self.optimizer = MasterAdamW(list(self.model.parameters()), optim=OptimConfig(), lr=LEARNING_RATE)
        self.tokens, self.labels = (x.to(place) for x in work.batch())

    def step(self, mark: Mark):
        """See the module."""
        with record_function("bench: forward and backward"), self.kernel_choice():
            loss = self.model(self.tokens, self.labels)
            loss.backward()
        mark("forward_backward")
        with record_function("bench: optimizer"):
            norm = self.optimizer.step()
        mark("optimizer")
        return loss.detach(), norm

    def close(self) -> None:
        """See the module."""
        del self.model, self.optimizer
        torch.compiler.reset()


PEERS = {"engine": EnginePeer, "hand": HandPeer}

"""Engine: one model on one layout, trained by megatron's schedules and optimizer.

Gradient accumulation, pipeline schedules, gradient reduction and loss weighting happen in here; the caller hands over
rows and gets sums of losses back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import mcore
from parallel.gradients import GradientBuffers
from parallel.mesh import Mesh
from parallel.optimizer import build_optimizer, saved_step_count, set_step_count, step, step_count
from parallel.pieces import Piece, objects_of, pieces_of, put_back
from parallel.place import primitive, section
from parallel.schedule import LossSum, chunks_of, run_rows
from parallel.sequence.shard import IGNORE, Row

_SHARDING = {"non_homogeneous_layers": True}


class Engine:
    """Owns the model, its gradients and its optimizer for the life of one mesh."""

    def __init__(self, model, mesh: Mesh, *, adam: dict):
        """model: this rank's stage or the list of its chunks, on its device, weights still to be set.

        adam: arguments of build_optimizer.
        """
        self.mesh, self.models = mesh, chunks_of(model)
        self.config = self.models[0].config
        overlap = mesh.device.type == "cuda"
        self.chunks = [
            GradientBuffers(self.config, chunk, overlap=overlap, one_bucket=index > 0)
            for index, chunk in enumerate(self.models)
        ]
        if overlap:
            no_sync = [chunk.no_sync for chunk in self.chunks]
            self.config.no_sync_func = no_sync if mesh.layout.vpp > 1 else no_sync[0]
        self.config.finalize_model_grads_func = _finalize_gradients
        self.metrics: dict = {}
        self.skipped = False
        self._row_sums: Tensor | None = None
        self._sound = True
        first, *others = self.models
        self.expert_steps = first.expert_steps.joined([chunk.expert_steps for chunk in others])
        self.spike_steps = first.spike_steps.joined([chunk.spike_steps for chunk in others])
        self.optimizer, self._clip_grad = build_optimizer(self.chunks, **adam), adam["clip_grad"]
        self.config.grad_scale_func = self.optimizer.scale_loss

    @property
    def model(self):
        """The stage, where it is one chunk."""
        assert len(self.models) == 1, "a stage of several chunks: use models"
        return self.models[0]

    @property
    def chunk(self) -> GradientBuffers:
        """The stage's gradients, where it is one chunk."""
        assert len(self.chunks) == 1, "a stage of several chunks: use chunks"
        return self.chunks[0]

    def close(self) -> None:
        """Let go of model, gradients and optimizer, for the next layout; without this they are never freed.

        megatron ties them into cycles through its configuration and gradient hooks.
        """
        self.config.grad_scale_func = self.config.no_sync_func = self.config.finalize_model_grads_func = None
        for chunk in self.chunks:
            chunk.grad_accs.clear()
        del self.models, self.chunks, self.optimizer, self.expert_steps, self.spike_steps

    def trained(self, tokens: int) -> None:
        """Say how many tokens the run has been trained on: what changes with them in the model follows."""
        self.spike_steps.trained(tokens)

    def weights_changed(self) -> None:
        """Call after writing into the model's parameters: the fp32 master copies follow them."""
        self.optimizer.reload_model_params()

    def forward_backward(self, rows: list[Row]) -> LossSum:
        """Loss and gradients of one step from this data-parallel rank's rows (equal in length and number on all ranks).

        Every gradient ends as the derivative of the mean over all scored tokens of the global batch.
        """
        with section("forward and backward"):
            self.optimizer.zero_grad()
            num_tokens = self._count_scored(rows)
            loss_scale = 1.0 / max(num_tokens, 1)
            for chunk in self.chunks:
                chunk.train()
            self.spike_steps.begin()
            self.expert_steps.begin(num_tokens=self.mesh.dp * sum(len(row.tokens) for row in rows))
            if self.expert_steps.lacks_load():
                with torch.no_grad():
                    run_rows(self.chunks, self.mesh, rows)
                self.expert_steps.take_load()
            for chunk in self.chunks:
                chunk.begin_step(loss_scale=loss_scale)
            self._row_sums = run_rows(self.chunks, self.mesh, rows, loss_scale=loss_scale)
            total = self._row_sums.sum(0)
            with primitive("sum of losses"):
                dist.all_reduce(total, group=self.mesh.groups.dp_cp)
                loss = LossSum(float(total[0]), num_tokens)
            self._sound = math.isfinite(loss.loss)
            return loss

    def broken_rows(self) -> list[int]:
        """Rows of the newest step whose loss is not finite, by their place in the global batch. Collective."""
        broken = torch.zeros(len(self._row_sums), self.mesh.dp, device=self.mesh.device)
        broken[:, self.mesh.dp_rank] = (~self._row_sums[:, 0].isfinite()).float()
        with primitive("broken rows"):
            dist.all_reduce(broken, group=self.mesh.groups.dp_cp)
            return broken.flatten().nonzero().flatten().tolist()

    def _count_scored(self, rows: list[Row]) -> int:
        """Scored tokens of the global batch, known before the forward pass so that no gradient need be rescaled."""
        count = torch.tensor(sum(int((row.labels != IGNORE).sum()) for row in rows), device=self.mesh.device)
        with primitive("count of scored tokens"):
            dist.all_reduce(count, group=self.mesh.groups.dp)
            return int(count)

    def gather_gradients(self) -> None:
        """Make param.main_grad whole on every rank after forward_backward, for inspection: ZeRO leaves each a part."""
        for buffer in (part for chunk in self.chunks for part in chunk.buffers + chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                parts = bucket.grad_data.chunk(group.size())
                dist.all_gather(list(parts), parts[group.rank()].clone(), group=group)

    def step(self, *, lr: float) -> float:
        """Clip, update the weights with this learning rate, and return the gradient norm before clipping.

        metrics then says what the model adds to the record of this step. Where the loss or the norm is not finite,
        on whichever rank, the step is skipped on all: nothing that a checkpoint holds changes, and skipped is True.
        """
        with section("optimizer step"):
            grad_norm = step(self.optimizer, lr=lr, clip_grad=self._clip_grad, sound=self._sound)
            self.skipped = not math.isfinite(grad_norm)
            self.metrics = {**self.expert_steps.end(skipped=self.skipped), **self.spike_steps.end()}
            return grad_norm

    def own_state(self) -> tuple[list[Piece], list[str]]:
        """This rank's own part of what is to be saved, without a word to the others; good while the engine lives.

        Tensors, and the names of objects, which are None. Pieces that are replicas come along, for put_back.
        """
        weights = sharded_weights(self.models, self.mesh)
        return pieces_of(weights, self.optimizer, self.models), objects_of(weights)

    def put_back(self, pieces: list[Piece], tensors: Iterable[Tensor], common: dict) -> None:
        """Be what own_state's pieces and common_state were once, bit for bit what loading a save of then makes of it.

        tensors: of each piece, 1-D. Every rank has them of the same step. Collective: a rank gets the rest of its
        weights from those that share them.
        """
        put_back(pieces, tensors)
        self.adopt(saved_step_count(common))

    def adopt(self, step_count: int) -> None:
        """Go on from what was written into own_state's pieces, behind so many updates. Collective."""
        set_step_count(self.optimizer, step_count)
        for chunk in self.chunks:
            chunk.start_param_sync(force_sync=True)
        for model in self.models:
            model.load_state_dict(model.state_dict())  # some parts take over what follows from a buffer

    def common_state(self) -> dict:
        """What is to be saved beside tensors, the same on all ranks."""
        return {"optimizer": {"step": step_count(self.optimizer)}}

    def load_weights(self, state: dict) -> None:
        """Take over what was loaded into sharded_weights; the optimizer begins with them."""
        load_weights(self.models, state)
        self.weights_changed()


def _finalize_gradients(chunks, num_tokens=None, **options) -> None:
    """megatron's reduction over the groups, without its division by num_tokens: the loss carries it already."""
    with section("gradient reduction"):
        for chunk in chunks:
            chunk.module.expert_steps.before_reduction()
        mcore.finalize_model_grads(chunks, None, **options)


class Weights:
    """Weights without an optimizer, to be saved as an engine's state is: what a conversion leaves for training."""

    def __init__(self, model, mesh: Mesh):
        """model: a stage or the list of its chunks."""
        self._models, self._mesh = chunks_of(model), mesh

    def own_state(self) -> tuple[list[Piece], list[str]]:
        """As Engine.own_state."""
        weights = sharded_weights(self._models, self._mesh)
        return pieces_of(weights, None, self._models), objects_of(weights)

    def common_state(self) -> dict:
        """As Engine.common_state: nothing."""
        return {}


def sharded_weights(model, mesh: Mesh) -> dict:
    """The weights of this rank's stage or chunks as megatron's sharded state dict, under their global names."""
    states = [chunk.sharded_state_dict(metadata=_metadata(mesh)) for chunk in chunks_of(model)]
    return states[0] if len(states) == 1 else {f"chunk_{index}": state for index, state in enumerate(states)}


def load_weights(chunks: list, state: dict) -> None:
    """Put what was loaded into sharded_weights of these chunks into them."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state if len(chunks) == 1 else state[f"chunk_{index}"])


def _metadata(mesh: Mesh) -> dict:
    return {**_SHARDING, "dp_cp_group": mesh.groups.dp_cp}

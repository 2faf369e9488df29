"""HybridModel: embedding, a decoder of mixed layers, head; or the part of it that one pipeline stage holds."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import ops
from parallel import mcore
from parallel.gradients import gradient_buffer
from parallel.layout import SequenceAlgorithms
from parallel.sequence.shard import Documents, with_bounds
from sbtrain.config.model_schema import MetaPositions, ModelConfig
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import Recompute
from sbtrain.model.cache import Cache, LayerCache
from sbtrain.model.decoder import Decoder
from sbtrain.moe.step import ExpertSteps
from sbtrain.spiking.step import SpikeSteps


class Embedding(mcore.MegatronModule):
    """Token embeddings, sharded by vocabulary over tp, behind those of the meta tokens, if any: the same on every rank.

    meta_tokens [num_meta, D] carries `is_new = True`; without meta tokens it is None.
    """

    def __init__(self, config: mcore.TransformerConfig, model: ModelConfig, groups):
        super().__init__(config)
        self.word_embeddings = mcore.VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel and not model.meta.num_tokens,
            config=config,
            tp_group=groups.tp,
        )
        self.meta_tokens, self.tp_group = None, groups.tp
        if model.meta.num_tokens:
            shape = model.meta.num_tokens, model.hidden_size
            meta_tokens = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.meta_tokens = nn.Parameter(meta_tokens)
            self.meta_tokens.is_new = True

    def forward(self, tokens: Tensor, *, with_meta: bool = True) -> Tensor:
        """tokens int64 [T] -> [num_meta+T,1,D], or this rank's part of that under tp_sequence_parallel.

        with_meta: False leaves the meta tokens' rows out.
        """
        embedded = self.word_embeddings(tokens[None])
        if self.word_embeddings.reduce_scatter_embeddings:
            return embedded
        embedded = embedded.transpose(0, 1)
        if self.meta_tokens is None or not with_meta:
            return embedded.contiguous()
        rows = torch.cat([self.meta_tokens[:, None], embedded])
        if not self.config.sequence_parallel:
            return rows
        return mcore.scatter_to_sequence_parallel_region(rows, group=self.tp_group)


class HybridModel(mcore.LanguageModule):
    """A decoder-only language model whose layers follow a pattern string. Sequences are packed rows (see Row)."""

    def __init__(
        self,
        config,
        model: ModelConfig,
        kinds,
        *,
        layers: range,
        groups,
        recompute: Recompute,
        sp_algorithm: SequenceAlgorithms,
        experts: ExpertsConfig,
    ):
        super().__init__(config, pg_collection=groups)
        self.model_type = mcore.ModelType.encoder_or_decoder
        self.model_config, self.groups, self.kinds = model, groups, kinds
        self.num_meta, self._meta, self._meta_of = model.meta.num_tokens, None, 0
        self.pre_process, self.post_process = layers.start == 0, layers.stop == model.num_layers
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.embedding = Embedding(config, model, groups) if self.pre_process else None
        self.decoder = Decoder(
            config,
            kinds,
            layers=layers,
            last=self.post_process,
            model=model,
            groups=groups,
            recompute=recompute,
            sp_algorithm=sp_algorithm,
            experts=experts,
        )
        moe_layers = [i for i, kind in enumerate(kinds) if kind.moe]
        self.expert_steps = ExpertSteps(
            {i: self.decoder.layers[i - layers.start].mlp for i in layers if i in moe_layers},
            all_layers=moe_layers,
            moe=model.moe,
        )
        self.spike_steps = SpikeSteps([self.decoder], model.spiking)
        self.output_layer = self._head(config, model) if self.post_process else None
        self._mark_shared_embedding()
        mcore.mark_tensor_parallel(self)
        self._input: Tensor | None = None

    def _head(self, config, model: ModelConfig) -> nn.Module:
        return mcore.ColumnParallelLinear(
            model.hidden_size,
            model.padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
            tp_group=self.groups.tp,
        )

    def _mark_shared_embedding(self) -> None:
        """Tell megatron which tied copies to keep in step over the pipeline: it sums their gradients."""
        if not self.share_embeddings_and_output_weights or (self.pre_process and self.post_process):
            return
        if self.pre_process or self.post_process:
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True
            weight.shared = not self.pre_process

    def set_input_tensor(self, input_tensor) -> None:
        """Called by the pipeline schedule with what the previous stage sent."""
        self._input = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(
        self,
        tokens: Tensor,
        documents: Documents,
        labels: Tensor | None = None,
        cache: Cache | None = None,
        num_logits: int | None = None,
    ) -> Tensor:
        """Run this stage on one row (shard).

        tokens int64 [T/sp] of this sp rank; documents describe the whole row; labels int64 [T/sp] or None.
        Returns hidden states [num_meta+T/sp,1,D] on inner stages; on the last one the loss of each token, fp32 [T/sp]
        (0 where the label is IGNORE), or without labels the logits [T/sp, vocab_size] in the model's dtype, of the
        last num_logits tokens alone if that is given.
        """
        x = self.hidden(tokens, documents, cache)
        if not self.post_process:
            return mcore.make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)
        if self.config.sequence_parallel:
            x = mcore.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.groups.tp)
        if cache is None and self.num_meta:
            x = x[self.num_meta :]
        if labels is not None:
            return self._loss(x[:, 0], labels)
        return self._logits(x[:, 0] if num_logits is None else x[-num_logits:, 0])

    def hidden(self, tokens: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """What this stage's layers make of a row (shard), [num_meta+T/sp,1,D] or, with a cache, [T/sp,1,D].

        A cache that has seen nothing begins with what the layers know of the meta tokens.
        """
        if self.num_meta:
            documents = documents.with_meta(self.num_meta, rotated=self._rotates_meta, rows=cache is None)
        if self.num_meta and cache is not None and not cache.layers:
            cache.layers.update({index: replace(layer) for index, layer in self._meta_layers().items()})
        x = self.embedding(tokens, with_meta=cache is None) if self.pre_process else self._input
        return self.decoder(x, documents, cache)

    def _meta_layers(self) -> dict[int, LayerCache]:
        """What each layer knows of the meta tokens, which see nothing else: computed once, until weights change."""
        weights = sum(parameter._version for parameter in self.parameters())
        if self._meta is None or self.training or weights != self._meta_of:
            self._meta_of = weights
            device = self.embedding.meta_tokens.device
            nothing = Documents(with_bounds([0, 0], device), torch.empty(0, dtype=torch.int64, device=device))
            documents = nothing.with_meta(self.num_meta, rotated=self._rotates_meta)
            self._meta = Cache()
            with torch.no_grad():
                self.decoder(self.embedding.meta_tokens[:, None], documents, self._meta)
        return self._meta.layers

    @property
    def _rotates_meta(self) -> bool:
        return self.model_config.meta.positions is MetaPositions.prepended

    def train(self, mode: bool = True) -> HybridModel:
        """As torch's; what is known of the meta tokens is forgotten, since weights may change."""
        self._meta = None
        return super().train(mode)

    def head_weight(self) -> Tensor:
        """The head's weight [V/tp, D], shared with the embedding where they are tied on one stage."""
        return (
            self.shared_embedding_or_output_weight() if self.output_layer.weight is None else self.output_layer.weight
        )

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        weight = self.head_weight()
        return ops.linear_cross_entropy(
            hidden,
            weight,
            labels,
            group=self.groups.tp if self.groups.tp.size() > 1 else None,
            valid_vocab=self.model_config.vocab_size,
            weight_grad=gradient_buffer(weight),
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(hidden, self.head_weight())
        logits = mcore.gather_from_tensor_model_parallel_region(logits, group=self.groups.tp)
        return logits[:, : self.model_config.vocab_size]

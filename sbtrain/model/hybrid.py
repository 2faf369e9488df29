"""HybridModel: embedding, a decoder of mixed layers, head; or the part of it that one pipeline stage holds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ops
from parallel import mcore
from parallel.gradients import gradient_buffer
from parallel.layout import SequenceAlgorithms
from parallel.sequence.shard import Documents
from sbtrain.config.moe_schema import ExpertsConfig
from sbtrain.config.schema import ModelConfig, Recompute
from sbtrain.model.cache import Cache
from sbtrain.model.decoder import Decoder
from sbtrain.moe.step import ExpertSteps


class Embedding(mcore.MegatronModule):
    """Token embeddings, sharded by vocabulary over tp."""

    def __init__(self, config: mcore.TransformerConfig, model: ModelConfig, groups):
        super().__init__(config)
        self.word_embeddings = mcore.VocabParallelEmbedding(
            model.padded_vocab_size,
            model.hidden_size,
            init_method=config.init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=groups.tp,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 [T] -> [T,1,D], or this rank's part of T under tp_sequence_parallel."""
        embedded = self.word_embeddings(tokens[None])
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()


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
            num_experts=model.moe.num_experts,
        )
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
        Returns hidden states [T,1,D] on inner stages; on the last one the loss of each token, fp32 [T/sp] (0 where
        the label is IGNORE), or without labels the logits [T/sp, vocab_size] in the model's dtype, of the last
        num_logits tokens alone if that is given.
        """
        x = self.embedding(tokens) if self.pre_process else self._input
        x = self.decoder(x, documents, cache)
        if not self.post_process:
            return mcore.make_viewless_tensor(inp=x, requires_grad=x.requires_grad, keep_graph=True)
        if self.config.sequence_parallel:
            x = mcore.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False, group=self.groups.tp)
        if labels is not None:
            return self._loss(x[:, 0], labels)
        return self._logits(x[:, 0] if num_logits is None else x[-num_logits:, 0])

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

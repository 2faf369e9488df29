"""The hybrid with pairs of mixers, meta tokens and experts for transformers, on any device, without custom kernels."""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_sbtrain_moe import SbtrainMoeConfig
from .mixers_gla_swa import RMSNorm, rotary_table
from .mixers_sbtrain_moe import MixtureOfExperts, SinkCache, TokenMixer
from .modeling_gla_swa import GLU, GLAswaForCausalLM, HybridModel, HybridPreTrainedModel


class SbtrainMoeBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = TokenMixer(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        moe = config.is_moe(layer)
        self.mlp = MixtureOfExperts(config, lambda size: GLU(config, layer, size)) if moe else GLU(config, layer)

    def forward(self, x, rope, valid, cache, meta=False):
        """x [B, T, D] -> [B, T, D]; see TokenMixer for the rest."""
        x = x + self.attn(self.input_layernorm(x), rope, valid, cache, meta)
        return x + self.mlp(self.post_attention_layernorm(x))


class SbtrainMoePreTrainedModel(HybridPreTrainedModel):
    """Base of the classes below."""

    config_class = SbtrainMoeConfig
    _no_split_modules = ["SbtrainMoeBlock"]


class SbtrainMoeModel(SbtrainMoePreTrainedModel):
    """Embedding, meta tokens, blocks and the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.num_meta_tokens:
            self.meta_tokens = nn.Parameter(torch.zeros(config.num_meta_tokens, config.hidden_size))
        self.layers = nn.ModuleList([SbtrainMoeBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        """For transformers."""
        return self.embed_tokens

    def set_input_embeddings(self, value):
        """For transformers."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        **kwargs,
    ):
        """input_ids [B, T] (or inputs_embeds [B, T, D]) after past_key_values, a SinkCache or None.

        attention_mask [B, past + T], or [B, T] of the new tokens: 0 is padding. position_ids [B, T], from 0 at a text's
        first token: None counts the tokens that are not padding. Meta tokens are in none of them.
        """
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if isinstance(past_key_values, SinkCache) else None
        if past_key_values is not None and cache is None and past_key_values.get_seq_length():
            raise ValueError("past_key_values must come from this model (a SinkCache); pass None to begin")
        cache = SinkCache() if cache is None else cache
        if not cache.get_seq_length():
            self._run_meta_tokens(x, cache)
        valid = HybridModel._valid(x, attention_mask, cache)
        if position_ids is None:
            position_ids = (valid.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        first = self.config.num_meta_tokens if self.config.meta_positions == "prepended" else 0
        rope = rotary_table(self.config, position_ids + first)
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, rope, valid, cache)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )

    def _run_meta_tokens(self, like, cache):
        """Leave the meta tokens' keys, values and states in the cache; they depend on no text."""
        num = self.config.num_meta_tokens
        if not num:
            return
        x = self.meta_tokens[None].to(like.dtype)
        positions = torch.arange(num, device=x.device)[None]
        rope = rotary_table(self.config, positions if self.config.meta_positions == "prepended" else 0 * positions)
        valid = torch.ones(1, num, dtype=torch.bool, device=x.device)
        for layer in self.layers:
            x = layer(x, rope, valid, cache, meta=True)


class SbtrainMoeForCausalLM(GLAswaForCausalLM):
    """The language model; see GLAswaForCausalLM for what forward and generate take."""

    config_class = SbtrainMoeConfig
    _no_split_modules = ["SbtrainMoeBlock"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        HybridPreTrainedModel.__init__(self, config)
        self.model = SbtrainMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """For transformers."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        """For transformers."""
        self.model.embed_tokens = value

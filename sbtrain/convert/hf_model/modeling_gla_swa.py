"""The hybrid decoder for transformers: SpikingBrain-7B and its relatives, on any device, without custom kernels."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_gla_swa import GLAswaConfig, SbtrainHybridConfig
from .mixers_gla_swa import GatedLinearAttention, HybridCache, RMSNorm, SoftmaxAttention, rotary_table
from .spiking_gla_swa import linear


class GLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config, layer, size=None):
        super().__init__()
        size = size or config.intermediate_size
        self.gate_proj = linear(config, layer, "gate_up", config.hidden_size, size)
        self.up_proj = linear(config, layer, "gate_up", config.hidden_size, size)
        self.down_proj = linear(config, layer, "down", size, config.hidden_size)

    def forward(self, x):
        """x [..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HybridBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = (GatedLinearAttention if config.kind(layer) == "L" else SoftmaxAttention)(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GLU(config, layer)

    def forward(self, x, rope, valid, cache):
        """x [B, T, D] -> [B, T, D]; see the mixers for the rest."""
        x = x + self.attn(self.attn_norm(x), rope, valid, cache)
        return x + self.mlp(self.mlp_norm(x))


class HybridPreTrainedModel(PreTrainedModel):
    """Base of the classes below."""

    config_class = GLAswaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HybridBlock"]


class HybridModel(HybridPreTrainedModel):
    """Embedding, blocks and the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([HybridBlock(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        """For transformers."""
        return self.embeddings

    def set_input_embeddings(self, value):
        """For transformers."""
        self.embeddings = value

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
        """input_ids [B, T] (or inputs_embeds [B, T, D]) after past_key_values, a HybridCache or None.

        attention_mask [B, past + T], or [B, T] of the new tokens: 0 is padding. position_ids [B, T]: None counts the
        tokens that are not padding.
        """
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = past_key_values if isinstance(past_key_values, HybridCache) else None
        if past_key_values is not None and cache is None and past_key_values.get_seq_length():
            raise ValueError("past_key_values must come from this model (a HybridCache); pass None to begin")
        if cache is None and use_cache:
            cache = HybridCache()
        valid = self._valid(x, attention_mask, cache)
        if position_ids is None:
            position_ids = (valid.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        rope = rotary_table(self.config, position_ids)
        hidden_states = []
        for layer in self.layers:
            hidden_states.append(x)
            x = layer(x, rope, valid, cache)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )

    @staticmethod
    def _valid(x, attention_mask, cache):
        """Which of all tokens so far are no padding, [B, past + T] bool; the cache remembers it."""
        past = cache.mask if cache is not None else None
        num_past = 0 if past is None else past.shape[1]
        total = num_past + x.shape[1]
        if attention_mask is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        elif attention_mask.dim() == 2 and attention_mask.shape[1] in (x.shape[1], total):
            valid = attention_mask.to(x.device).bool()
        else:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}; give [{x.shape[0]}, {total}], 0 at padding"
            )
        if valid.shape[1] < total:
            valid = torch.cat([past, valid], 1)
        if cache is not None:
            cache.mask = valid
        return valid


class GLAswaForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """The language model of the released SpikingBrain-7B: same configuration, same state_dict."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """For transformers."""
        return self.model.embeddings

    def set_input_embeddings(self, value):
        """For transformers."""
        self.model.embeddings = value

    def get_output_embeddings(self):
        """For transformers."""
        return self.lm_head

    def set_output_embeddings(self, value):
        """For transformers."""
        self.lm_head = value

    @classmethod
    def _supports_default_dynamic_cache(cls):
        """generate() starts without a cache, and the first forward makes a HybridCache."""
        return False

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, use_cache=None, **kwargs
    ):
        """What generate() feeds to forward: the tokens that the cache has not seen, and the mask of all."""
        num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": use_cache}
        if inputs_embeds is not None and num_past == 0:
            inputs["inputs_embeds"] = inputs_embeds
        elif inputs_embeds is not None:
            inputs["input_ids"] = input_ids[:, -1:]
        else:
            inputs["input_ids"] = input_ids[:, num_past:]
        if "logits_to_keep" in kwargs:
            inputs["logits_to_keep"] = kwargs["logits_to_keep"]
        return inputs

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, T, vocab] (the last logits_to_keep positions, if not 0) and, with labels [B, T], the mean loss.

        Labels are the inputs themselves: they are shifted here; -100 is ignored.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        kept = kept if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device))
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result if return_dict in (None, True) else result.to_tuple()


class SbtrainHybridForCausalLM(GLAswaForCausalLM):
    """The same model under the configuration that allows more."""

    config_class = SbtrainHybridConfig

"""The model's part of the recipe: every key of `model`, see sbtrain.config.schema."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from sbtrain.config.spiking_schema import SpikingConfig


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling of the rotary embedding (the only kind known here).

    factor: ratio by which low frequencies are slowed.
    low_freq_factor: ratio of original_max_positions to the longest wavelength that is kept.
    high_freq_factor: the same for the shortest wavelength that is scaled fully or in part.
    original_max_positions: context of the unscaled model, in tokens.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


class FeatureMap(Enum):
    """What gated linear attention makes of queries and keys: relu (SpikingBrain-7B) or sigmoid (76B)."""

    relu = "relu"
    sigmoid = "sigmoid"


class Gate(Enum):
    """Where the decay comes from: a projection of its own, low-rank (7B) or its two matrices merged into a full_rank
    one (the released INT8 7B), or the key, decay = 1 - key (76B)."""

    low_rank = "low_rank"
    full_rank = "full_rank"
    tied = "tied"


class MergeInit(Enum):
    """First weights of a pair's branch norms: the teacher's output RMS on a calibration batch, or ones."""

    calibrated = "calibrated"
    ones = "ones"


class MergePlace(Enum):
    """Where a pair's branch norms are: behind output projections of their own, or before them (Hymba)."""

    behind_projection = "behind_projection"
    before_projection = "before_projection"


class MetaInit(Enum):
    """First values of meta tokens: normal ones, or the embeddings of the commonest tokens of the data."""

    normal = "normal"
    frequent = "frequent"


class MetaPositions(Enum):
    """Rotary positions of meta tokens: 0, 1, ... with documents behind them, or none, documents starting at 0."""

    prepended = "prepended"
    unrotated = "unrotated"


class RouterScore(Enum):
    """What turns router logits into the weights of experts."""

    softmax = "softmax"
    sigmoid = "sigmoid"


@dataclass(frozen=True)
class GLAConfig:
    """Gated linear attention as in SpikingBrain-7B (report, section 2.1) or, sigmoid and tied, in the 76B (3.1).

    feature_map: of queries and keys.
    gate: where the decay comes from; tied needs the sigmoid feature map.
    lower_bound: of a tied gate's decay, which is then lower_bound + (1 - lower_bound)(1 - key); at least 0, below 1.
    rope: queries and keys are rotated behind the feature map, as those of softmax attention are.
    gate_rank: width of a low-rank gate's bottleneck, in channels.
    gate_normalizer: divisor of the log decay unless the gate is tied; 16 gives a new gate a half-life of 16 tokens.
    out_norm_init: weight of a new output norm at conversion. 1 is the released code's; softmax attention puts out
        less, so a smaller weight starts closer to the teacher.
    """

    feature_map: FeatureMap = FeatureMap.relu
    gate: Gate = Gate.low_rank
    lower_bound: float = 0.0
    rope: bool = False
    gate_rank: int = 16
    gate_normalizer: float = 16.0
    out_norm_init: float = 1.0


@dataclass(frozen=True)
class PairConfig:
    """Layers whose two mixers work in parallel on one input, `(LS)` (SpikingBrain-76B; report, section 2.2).

    shared_projections: both mixers share q, k, v and output projections; the branch norms then come before the output
        projection. Otherwise each has its own, and its norm after it.
    norm_init: first weights of the branch norms.
    calibration_tokens: tokens of the calibration batch.
    norm_place: of the branch norms, whose weights also weigh the branches, where the projections are not shared.
    """

    shared_projections: bool = False
    norm_init: MergeInit = MergeInit.calibrated
    calibration_tokens: int = 65_536
    norm_place: MergePlace = MergePlace.behind_projection

    @property
    def norms_before_projection(self) -> bool:
        """Whether the branch norms are over the channels of all heads."""
        return self.shared_projections or self.norm_place is MergePlace.before_projection


@dataclass(frozen=True)
class MetaConfig:
    """Learnable tokens before every document that all of its tokens see (SpikingBrain-76B's sinks; section 2.2).

    num_tokens: how many; 0 is none, the 76B has 128. They see one another, both ways, and nothing else.
    positions: their rotary positions.
    in_state: gated linear attention reads them too: their state is the first state of every document.
    init: their first values; frequent counts the data's first pair.calibration_tokens tokens and needs start.path.
    init_std: standard deviation of normal first values.
    """

    num_tokens: int = 0
    positions: MetaPositions = MetaPositions.prepended
    in_state: bool = True
    init: MetaInit = MetaInit.normal
    init_std: float = 0.02


@dataclass(frozen=True)
class MoEConfig:
    """Mixture-of-experts FFNs, of layers marked `:m` (SpikingBrain-76B; report, sections 2.2 and 3.2).

    num_experts: routed experts a layer.
    top_k: routed experts that a token goes to.
    num_shared_experts: experts that every token goes to.
    expert_ffn_size: width of an expert, in channels; null is the dense FFN's.
    score: what turns router logits into weights.
    renormalize: the weights of the top_k experts of a token add up to 1; top_k=1 needs false.
    router_init_std: standard deviation of a new router's weights; so small that a new router is even, as upcycling
        expects (docs/moe.md).
    aux_loss_coeff: of the load-balancing loss over the global batch; 0 is none.
    exact_aux_loss: it weighs with the load of the step itself, which takes another forward pass a step; false: with
        that of the step before, in the first step with its own.
    z_loss_coeff: of the squared log-sum-exp of router logits; 0 is none.
    bias_update_rate: step of the balancing bias that only choices see, an optimizer step; 0 is none. sigmoid only.
    capacity_factor: in training, an expert takes at most this times its even share of a rank's tokens and drops the
        rest; 0 drops nothing.
    """

    num_experts: int = 16
    top_k: int = 1
    num_shared_experts: int = 1
    expert_ffn_size: Optional[int] = None
    score: RouterScore = RouterScore.softmax
    renormalize: bool = False
    router_init_std: float = 1e-3
    aux_loss_coeff: float = 1e-3
    exact_aux_loss: bool = False
    z_loss_coeff: float = 0.0
    bias_update_rate: float = 0.0
    capacity_factor: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. Fields left at null are read from `start.path`/config.json; given ones must agree with it.

    pattern: layer symbols, tiled to num_layers: F full attention, S sliding window, L gated linear attention;
        `LS x 14`. Two in parentheses, `(LS)`, work in parallel; `:m` makes a layer's FFN a mixture of experts.
    vocab_size: tokens of the vocabulary, before padding.
    hidden_size: width of the residual stream, in channels.
    num_layers: decoder layers.
    num_heads: query heads a layer.
    num_kv_heads: key/value heads a layer; divides num_heads.
    head_dim: channels a head.
    ffn_size: width of the SwiGLU FFN, in channels.
    norm_eps: epsilon of every RMSNorm.
    rope_theta: base of the rotary embedding.
    rope_scaling: Llama-3 frequency scaling; null for none.
    max_positions: context the checkpoint declares, in tokens; written to exports.
    tie_embeddings: the output layer shares the embedding's weights.
    qkv_bias: the q, k and v projections have biases.
    qk_norm: RMSNorm on queries and keys of F and S layers.
    window: visible keys of an S layer, in tokens, the query itself included.
    vocab_multiple: the embedding is padded to a multiple of this, independent of the layout; padding never wins
        probability.
    gla: gated linear attention of the L layers.
    pair: layers with two mixers.
    meta: learnable tokens before every document.
    moe: mixture-of-experts FFNs.
    spiking: activations as spikes.
    """

    pattern: str = "F"
    vocab_size: Optional[int] = None
    hidden_size: Optional[int] = None
    num_layers: Optional[int] = None
    num_heads: Optional[int] = None
    num_kv_heads: Optional[int] = None
    head_dim: Optional[int] = None
    ffn_size: Optional[int] = None
    norm_eps: Optional[float] = None
    rope_theta: Optional[float] = None
    rope_scaling: Optional[RopeScaling] = None
    max_positions: Optional[int] = None
    tie_embeddings: Optional[bool] = None
    qkv_bias: Optional[bool] = None
    qk_norm: Optional[bool] = None
    window: int = 4097
    vocab_multiple: int = 128
    gla: GLAConfig = field(default_factory=GLAConfig)
    pair: PairConfig = field(default_factory=PairConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    spiking: SpikingConfig = field(default_factory=SpikingConfig)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

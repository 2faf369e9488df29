"""The recipe as frozen dataclasses: every key a user may set, its unit and its default, written once, here.

YAML files and command-line overrides are merged strictly into these classes by `sbtrain.config.load`; an unknown
key or a wrong type dies there. What a single field cannot know is checked by `sbtrain.config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Dict, Optional

from parallel.layout import Layout


class Precision(Enum):
    """Arithmetic of the model. bf16 keeps fp32 master weights, gates, states and reductions."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """What the backward pass computes again: nothing, the FFN of every layer, or whole layers."""

    none = "none"
    selective = "selective"
    full = "full"


class Objective(Enum):
    """What a stage minimizes: cross-entropy, alignment with or distillation from the teacher, or fine-tuning."""

    ce = "ce"
    align = "align"
    kd = "kd"
    sft = "sft"


class Decay(Enum):
    """Shape of the learning rate after warmup. wsd holds the peak, then decays over the last `decay_fraction`."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


@dataclass(frozen=True)
class RopeScaling:
    """Llama-3 frequency scaling (the only kind known here); all factors are plain ratios, the length in tokens."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class GLAConfig:
    """Gated linear attention as in SpikingBrain-7B (report section 2.1, `architectures` 1.4)."""

    gate_rank: int = 16
    gate_normalizer: float = 16.0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. Fields left at None are read from `start.path`/config.json; given ones must agree with it.

    pattern: one symbol a layer, tiled to num_layers: F full attention, S sliding window, L gated linear attention.
    window: visible keys of an S layer, the query itself included.
    vocab_multiple: the embedding is padded to a multiple of this, independent of the layout; padding never wins
        probability.
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

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to a multiple of vocab_multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class Start:
    """Where the first weights come from. path: a Hugging Face folder; empty means random weights from the seed."""

    path: str = ""


@dataclass(frozen=True)
class Source:
    """One tokenized corpus: `path` is the prefix of the .bin/.idx/.json files that prepare_data wrote."""

    path: str = ""
    weight: float = 1.0
    valid: str = ""


@dataclass(frozen=True)
class DataConfig:
    """Corpora by name, and the folder with the tokenizer.json that made them."""

    tokenizer: str = ""
    sources: Dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. new_lr_scale multiplies the learning rate of parameters that the teacher did not have."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    new_lr_scale: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate by tokens seen in the stage: linear warmup to `lr`, then `decay` to `min_lr`."""

    lr: float = 3e-5
    min_lr: float = 3e-6
    warmup_tokens: int = 0
    decay: Decay = Decay.cosine
    decay_fraction: float = 0.2


@dataclass(frozen=True)
class Stage:
    """One leg of the training: a context length, a token budget, a layout.

    seq_len, tokens, global_batch_tokens are in tokens; micro_batch is in sequences that form one row.
    blend overrides the weights of data.sources by name; empty keeps them.
    """

    seq_len: int = 8192
    tokens: int = 0
    global_batch_tokens: int = 4_194_304
    micro_batch: int = 1
    objective: Objective = Objective.ce
    layout: Layout = field(default_factory=Layout)
    schedule: Schedule = field(default_factory=Schedule)
    recompute: Recompute = Recompute.none
    blend: Dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointConfig:
    """every_steps: 0 saves at stage ends and signals alone. keep_last: how many step folders stay (0 keeps all)."""

    every_steps: int = 0
    keep_last: int = 2


@dataclass(frozen=True)
class LogConfig:
    """Sinks beside the console and metrics.jsonl, and how often the console speaks (steps)."""

    every_steps: int = 1
    wandb: bool = False
    wandb_project: str = "sbtrain"
    wandb_mode: str = "offline"
    tensorboard: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation in bits per byte before the first and after each stage. tokens per source; 0 turns it off."""

    tokens: int = 0
    seq_len: int = 0
    teacher: bool = False


@dataclass(frozen=True)
class ClusterConfig:
    """The machine that plans and MFU refer to. Peaks in TFLOP/s (dense bf16) and bytes per GPU."""

    name: str = "laptop"
    num_gpus: int = 1
    gpus_per_node: int = 8
    peak_tflops: float = 0.0
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A whole run. `run_dir` empty means runs/NAME."""

    name: str = ""
    run_dir: str = ""
    seed: int = 0
    precision: Precision = Precision.bf16
    model: ModelConfig = field(default_factory=ModelConfig)
    start: Start = field(default_factory=Start)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stages: Dict[str, Stage] = field(default_factory=dict)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    ops: Dict[str, str] = field(default_factory=dict)
    export_dir: str = ""
    dry_run: bool = False
    layout_auto: bool = False

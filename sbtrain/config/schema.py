"""The recipe as frozen dataclasses: every key a user may set, its unit and its default, written once, here.

YAML files and command-line overrides are merged strictly into these classes by `sbtrain.config.load`; an unknown
key or a wrong type dies there. What a single field cannot know is checked by `sbtrain.config.rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Dict

from parallel.layout import Layout
from sbtrain.config.model_schema import ModelConfig
from sbtrain.config.moe_schema import ExpertsConfig


class Precision(Enum):
    """Arithmetic of the model. bf16 keeps fp32 master weights, gates, states and reductions."""

    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(Enum):
    """What the backward pass computes again.

    none: nothing. activations: the FFN's activations and routers. selective: also the FFNs, those of experts included,
    without sending rows to experts again. full: whole layers.
    """

    none = "none"
    activations = "activations"
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
class Start:
    """Where the first weights come from.

    path: a Hugging Face folder; empty means random weights from the seed.
    """

    path: str = ""


@dataclass(frozen=True)
class Source:
    """One tokenized corpus.

    path: prefix of the .bin/.idx/.json files that prepare_data wrote.
    weight: share in the blend, relative to the other sources.
    valid: prefix of its held-out text; empty for none.
    """

    path: str = ""
    weight: float = 1.0
    valid: str = ""


@dataclass(frozen=True)
class DataConfig:
    """What is read.

    tokenizer: folder with the tokenizer.json that made the corpora.
    sources: corpora by name.
    """

    tokenizer: str = ""
    sources: Dict[str, Source] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW.

    beta1: decay of the first moment a step.
    beta2: decay of the second moment a step.
    eps: added to the denominator.
    weight_decay: decoupled, relative to the learning rate; matrices only.
    clip_grad: largest norm of the whole gradient; 0 does not clip.
    new_lr_scale: multiplies the learning rate of parameters that the teacher did not have.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    new_lr_scale: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Learning rate by tokens seen in the stage: linear warmup to `lr`, then `decay` to `min_lr`.

    lr: peak learning rate.
    min_lr: learning rate at the end of the stage.
    warmup_tokens: length of the warmup, in tokens.
    decay: shape after the warmup.
    decay_fraction: part of the stage's tokens over which wsd decays.
    """

    lr: float = 3e-5
    min_lr: float = 3e-6
    warmup_tokens: int = 0
    decay: Decay = Decay.cosine
    decay_fraction: float = 0.2


@dataclass(frozen=True)
class Stage:
    """One leg of the training: a context length, a token budget, a layout.

    seq_len: context length, in tokens.
    tokens: budget of the stage, in tokens, rounded up to whole steps.
    global_batch_tokens: tokens of one optimizer step over all ranks; a multiple of seq_len x micro_batch x dp.
    micro_batch: sequences that form one row, the unit of a forward pass.
    objective: what is minimized.
    layout: ranks per kind of parallelism.
    num_nodes: hosts of the stage in a chain of Slurm jobs; 0 takes what submit.sh is given.
    schedule: learning rate.
    recompute: what the backward pass computes again to save memory.
    experts: how mixtures of experts are run.
    blend: weights of data.sources by name, for this stage; empty keeps theirs.
    """

    seq_len: int = 8192
    tokens: int = 0
    global_batch_tokens: int = 4_194_304
    micro_batch: int = 1
    objective: Objective = Objective.ce
    layout: Layout = field(default_factory=Layout)
    num_nodes: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    recompute: Recompute = Recompute.none
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    blend: Dict[str, float] = field(default_factory=dict)

    @property
    def row_tokens(self) -> int:
        """Tokens of one row (micro-batch)."""
        return self.seq_len * self.micro_batch

    @property
    def num_rows(self) -> int:
        """Rows of one optimizer step, over all data-parallel ranks."""
        return self.global_batch_tokens // self.row_tokens

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage: the budget, rounded up to whole steps."""
        return -(-self.tokens // self.global_batch_tokens)


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and how many stay.

    every_steps: steps between saves; 0 saves at stage ends and signals alone.
    asynchronous: training waits only until its state is in host memory; a process writes it from there. Needs room for
        two snapshots of every rank in the memory of its host.
    snapshot_every_steps: steps between snapshots for the memory alone, with asynchronous: what
        watch.on_spike=rollback goes back to where it is newer than the newest checkpoint; 0 takes none.
    keep_last: step folders that stay; 0 keeps all.
    keep_every_steps: checkpoints of steps that are a multiple of this stay besides; 0 keeps none.
    """

    every_steps: int = 0
    asynchronous: bool = False
    snapshot_every_steps: int = 0
    keep_last: int = 2
    keep_every_steps: int = 0


@dataclass(frozen=True)
class LogConfig:
    """Sinks beside the console and metrics.jsonl.

    every_steps: steps between console lines.
    wandb: log to Weights & Biases.
    wandb_project: its project.
    wandb_mode: offline, online or disabled.
    tensorboard: write TensorBoard files into the run directory.
    """

    every_steps: int = 1
    wandb: bool = False
    wandb_project: str = "sbtrain"
    wandb_mode: str = "offline"
    tensorboard: bool = False


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation in bits per byte, before the first stage and after each.

    tokens: held-out tokens read per source; 0 turns it off.
    seq_len: context of the evaluation, in tokens; 0 takes the longest stage's.
    teacher: measure the unconverted checkpoint too, once.
    """

    tokens: int = 0
    seq_len: int = 0
    teacher: bool = False


LEAST_PATIENCE_S = 6 * 3600.0
"""A checkpoint of a large model on a slow disk, with room to spare."""


@dataclass(frozen=True)
class RuntimeConfig:
    """What the ranks of a job expect of one another.

    timeout_s: when a rank was killed or hangs, the others end after this time, in seconds, with exit code 76 and a line
        that names it. Checkpoints, first weights and the check of the data may take longer: torch itself gives a
        collective up after three times this time, but not before 6 hours, so one of them may take as long.
    deterministic: a run that is interrupted and goes on with the same layout has the losses and weights of one that is
        not, to the last bit. Full attention does without cuDNN for it, and NCCL sums along rings (NCCL_ALGO, where
        that is not set); docs/checkpoints.md has what it costs.
    """

    timeout_s: float = 600.0
    deterministic: bool = True

    @property
    def patience_s(self) -> float:
        """What torch waits in a collective, in seconds: the last resort, also for what may take one rank long."""
        return max(3 * self.timeout_s, LEAST_PATIENCE_S)


class OnSpike(Enum):
    """What a run does where its loss spikes. rollback goes back to the newest checkpoint, past the data since then."""

    tell = "tell"
    rollback = "rollback"


@dataclass(frozen=True)
class WatchConfig:
    """What a run looks out for while it trains.

    max_skipped_steps: a step whose loss or gradient is not finite changes nothing and is skipped; so many may be among
        the last window_steps, one more stops the run.
    window_steps: steps that a loss is compared with, and that skipped ones are counted in.
    spike_score: a loss so many standard deviations above the median of those steps is a spike; 0 never.
    on_spike: tell reports it; rollback also goes back to the newest checkpoint or snapshot
        (checkpoint.snapshot_every_steps), and on with the samples after the spike's.
    max_rollbacks: so many may go to one step, less than window_steps before it, or behind it; the next spike stops.
    measure_every_steps: steps between measurements of the ranks' compute time, memory, disk and clocks; 0 never.
    slow_ratio: a rank that computes for so many times as long as its like is reported as slow.
    memory_share: part of a GPU's memory in use above which a run is near its limit.
    clock_skew_s: difference between the hosts' clocks, in seconds, from which on it is reported.
    """

    max_skipped_steps: int = 5
    window_steps: int = 100
    spike_score: float = 6.0
    on_spike: OnSpike = OnSpike.tell
    max_rollbacks: int = 3
    measure_every_steps: int = 10
    slow_ratio: float = 1.3
    memory_share: float = 0.95
    clock_skew_s: float = 5.0


@dataclass(frozen=True)
class ClusterConfig:
    """The machine that plans and MFU refer to.

    name: what reports call it.
    num_gpus: GPUs of the job; the world size of a dry run.
    gpus_per_node: GPUs of one host.
    peak_tflops: dense bf16 peak of one GPU, in TFLOP/s; 0 is unknown and leaves MFU out.
    memory_gib: memory of one GPU, in GiB; 0 is unknown.
    """

    name: str = "laptop"
    num_gpus: int = 1
    gpus_per_node: int = 8
    peak_tflops: float = 0.0
    memory_gib: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    name: what the run is called; empty takes the recipe's.
    run_dir: folder of the run; empty means runs/NAME.
    seed: of the random weights and the data order.
    precision: arithmetic of the model.
    model: shape of the decoder.
    start: where the first weights come from.
    data: what is read.
    optim: the optimizer.
    stages: legs of the training by name, in the order they run.
    checkpoint: when checkpoints are written.
    log: what is logged, and where.
    evaluation: held-out evaluation during the run.
    cluster: the machine that plans and MFU refer to.
    runtime: what the ranks of a job expect of one another.
    watch: what a run looks out for while it trains.
    ops: backend by op name, to force one (`python -m ops` lists them), or "auto or reference": see docs/ops.md.
    export_dir: folder of the Hugging Face export at the end; empty exports nothing.
    dry_run: print the plan of the run and exit; reads no weights.
    layout_auto: replace layouts that do not fit the world by ones that do.
    stop_after: stage at whose end this start stops; the next may have another world. Empty goes to the end.
    """

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
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    ops: Dict[str, str] = field(default_factory=dict)
    export_dir: str = ""
    dry_run: bool = False
    layout_auto: bool = False
    stop_after: str = ""

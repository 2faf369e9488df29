"""The one door to megatron.core: the version we are pinned to, the names we use, and the fixes it needs.

Importing this file makes megatron.core usable on CPU too (see `parallel.cpu`). Nothing else imports megatron.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import asdict

import torch

from parallel import cpu, fixes, safe_load

_ON_CPU = cpu.install()

warnings.filterwarnings("ignore", category=DeprecationWarning, module="megatron")
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "When using expert parallelism and tensor parallelism",  # about megatron's layer; ours deals tokens over tp
    "The .grad attribute of a Tensor that is not a leaf",
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    "`load_state_dict` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
logging.getLogger("megatron.core").setLevel(logging.ERROR)

import megatron.core  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402, F401
from megatron.core.datasets.indexed_dataset import (  # noqa: E402, F401
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)
from megatron.core.dist_checkpointing.core import CheckpointingConfig  # noqa: E402, F401
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402, F401
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies import torch as _tensor_files  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402, F401
from megatron.core.dist_checkpointing.strategies.common import (  # noqa: E402
    TorchCommonLoadStrategy,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import (  # noqa: E402
    _split_by_size_and_type as split_by_size_and_type,  # noqa: F401
)
from megatron.core.dist_checkpointing.utils import (  # noqa: E402, F401
    extract_sharded_tensors_and_factories,
    replace_prefix_for_sharding,
)
from megatron.core.distributed import (  # noqa: E402, F401
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,  # noqa: E402, F401
)
from megatron.core.enums import ModelType  # noqa: E402, F401
from megatron.core.models.common.language_module.language_module import LanguageModule  # noqa: E402, F401
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402, F401
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate  # noqa: E402, F401
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402, F401
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402, F401
from megatron.core.tensor_parallel import (  # noqa: E402, F401
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel import random as _random  # noqa: E402
from megatron.core.transformer.mlp import MLP, MLPSubmodules  # noqa: E402, F401
from megatron.core.transformer.module import MegatronModule  # noqa: E402, F401
from megatron.core.transformer.moe import moe_utils as _moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, router_gating_linear  # noqa: E402, F401
from megatron.core.transformer.spec_utils import ModuleSpec, build_module  # noqa: E402, F401
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402, F401
from megatron.core.transformer.utils import sharded_state_dict_default  # noqa: E402, F401
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint, make_viewless_tensor  # noqa: E402, F401

PINNED = "0.16.1"
CHECKPOINT_FORMAT = asdict(CheckpointingConfig("torch_dist", 1))
"""What metadata.json of a checkpoint says."""

if megatron.core.__version__ != PINNED:
    raise ImportError(
        f"megatron-core {megatron.core.__version__} is installed; sbtrain needs {PINNED}: "
        f"pip install megatron-core=={PINNED}"
    )
if _ON_CPU:
    cpu.patch_megatron(_random)


if not hasattr(_moe_utils, "te_general_gemm"):  # without TransformerEngine every router raises NameError
    _moe_utils.te_general_gemm = None
_tensor_files._get_filesystem_reader = safe_load.open_reader
_tensor_files.MCoreLoadPlanner.load_bytes = safe_load.load_bytes
TorchCommonLoadStrategy.load_common = safe_load.load_common
P2PCommunicator._communicate = fixes.keeping_what_is_sent(P2PCommunicator._communicate)


def mark_tensor_parallel(module: torch.nn.Module) -> None:
    """Say which weights are sharded over tp. megatron does it while initializing them, which we skip.

    Without the mark the gradient norm would count each sharded weight on the first tp rank alone.
    """
    for part in module.modules():
        if isinstance(part, (ColumnParallelLinear, VocabParallelEmbedding)):
            sharded = [part.weight, getattr(part, "bias", None)]
        elif isinstance(part, RowParallelLinear):
            sharded = [part.weight]
        else:
            continue
        dim = 1 if isinstance(part, RowParallelLinear) else 0
        for weight in sharded:
            if weight is not None:
                mark_sharded(weight, dim=dim)


def mark_sharded(weight: torch.nn.Parameter, *, dim: int) -> None:
    """Say that the weight is one tp rank's part of a larger one, cut along dim."""
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1

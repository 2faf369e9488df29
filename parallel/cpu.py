"""The CPU compatibility layer: lets megatron-core run on CPU with gloo. Inert where a GPU is present.

megatron-core asks torch.cuda for devices, streams and random states throughout. `install` gives those calls a CPU
answer, process-wide, before megatron.core is imported; `on_meta` builds modules without memory for their weights.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "linspace", "eye", "as_tensor"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "empty_strided"),
)


class _Stream:
    """A stream that runs everything at once, as the CPU does."""

    device, cuda_stream, stream_id = CPU, 0, 0

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def wait_stream(self, *args):
        pass

    wait_event = synchronize = wait_stream

    def record_event(self, event=None):
        return event or _Event()

    def query(self):
        return True


class _Event:
    """An event that reads the host clock; elapsed_time is in milliseconds, as CUDA's is."""

    def __init__(self, *args, **kwargs):
        self.record()

    def record(self, *args):
        self._time_s = time.perf_counter()

    def wait(self, *args):
        pass

    synchronize = wait

    def query(self):
        return True

    def elapsed_time(self, other):
        return (other._time_s - self._time_s) * 1e3


def install() -> bool:
    """Patch torch so that megatron-core runs on the CPU. Returns False, and does nothing, where CUDA is available."""
    if torch.cuda.is_available() or getattr(torch.cuda, "_sbtrain_stand_in", False):
        return False
    torch.cuda._sbtrain_stand_in = True
    # torch recognizes factories inside `with torch.device(...)` by identity and lists them on first use: let it list
    # the originals, which ours call, or that context would be ignored from here on
    _device_constructors()
    _patch_factories()
    _patch_tensor()
    _patch_cuda()
    _patch_random()
    _patch_collectives()
    return True


def _is_cuda(device) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _patch_factories() -> None:
    def on_cpu(factory):
        @functools.wraps(factory)
        def call(*args, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return factory(*args, **kwargs)

        return call

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _patch_tensor() -> None:
    tensor, tensor_to, tensor_type = torch.Tensor, torch.Tensor.to, torch.Tensor.type

    def to(self, *args, **kwargs):
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return tensor_to(self, *args, **kwargs)

    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return tensor_type(self, dtype, *args, **kwargs)
        # megatron's optimizers compare this string with 'torch.cuda.FloatTensor'
        return tensor_type(self).replace("torch.", "torch.cuda.", 1).replace("cuda.cuda.", "cuda.")

    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = lambda self, *args: None
    tensor.to, tensor.type = to, type_
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def _answer(value=None):
    """A new function that takes anything and returns value (each name needs its own: torch._dynamo indexes them)."""
    return lambda *args, **kwargs: value


def _patch_cuda() -> None:
    cuda, stream = torch.cuda, _Stream()
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: 1
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream, cuda.default_stream = _answer(stream), _answer(stream)
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.is_current_stream_capturing = _answer(False)
    cuda.get_device_capability = _answer((0, 0))
    for name in ("set_device", "synchronize", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, _answer())
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _answer())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, _answer(0))


def _patch_random() -> None:
    """The CPU generator stands in for the GPU's."""
    generator = torch.default_generator
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda *args, **kwargs: generator.get_state()
        module.set_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
        module.manual_seed = lambda seed: generator.manual_seed(int(seed))
        module.manual_seed_all = lambda seed: generator.manual_seed(int(seed))


def _patch_collectives() -> None:
    all_to_all_single = dist.all_to_all_single

    def sizes(splits):
        return None if splits is None else [int(size) for size in splits]

    @functools.wraps(all_to_all_single)
    def call(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        # megatron turns split sizes into a list only for CUDA tensors
        return all_to_all_single(
            output, input, sizes(output_split_sizes), sizes(input_split_sizes), group=group, async_op=async_op
        )

    dist.all_to_all_single = call


def patch_megatron(random_module) -> None:
    """Replace the private torch.cuda calls that megatron.core.tensor_parallel.random captured at import."""
    random_module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.default_generator.set_state(
        state
    )
    random_module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.default_generator.get_state()
    )
    logging.getLogger(random_module.__name__).addFilter(lambda rec: "CPU RNG state changed" not in rec.getMessage())


class on_meta(TorchFunctionMode):
    """Context: every tensor made inside lands on the meta device, also those whose maker names another device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in _FACTORIES:
            kwargs["device"] = torch.device("meta")
        return function(*args, **kwargs)

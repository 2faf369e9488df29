"""Lets PyTorch's allocator grow its segments on NVIDIA GPUs, unless the caller has set it: imported before torch.

Experts receive another number of rows in every step, and no freed block fits the next request: without this, memory
fragments until a step stalls while the allocator hands everything back to the device.
"""

import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What torch reads, since 2.9 and before; an older torch keeps its default."""

if "MACA_PATH" not in os.environ and not any(name in os.environ for name in NAMES):
    os.environ[NAMES[0]] = "expandable_segments:True"

"""What megatron-core 0.16.1 gets wrong, put right; `parallel.mcore` puts it in the place of megatron's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps


def keeping_what_is_sent(communicate: Callable) -> Callable:
    """P2PCommunicator._communicate, sending through tensors of its own.

    The interleaved schedule takes the memory from a stage's output (`output.data = ...`) before the send of it was
    waited for. A send that is under way holds the tensor, not its memory, and gloo goes on reading what has been freed;
    so may NCCL, depending on how torch protects the memory of asynchronous calls. An alias keeps the memory.
    """

    @wraps(communicate)
    def wrapper(self, *, tensor_send_next, tensor_send_prev, **options):
        next_, previous = (None if x is None else x.detach() for x in (tensor_send_next, tensor_send_prev))
        return communicate(self, tensor_send_next=next_, tensor_send_prev=previous, **options)

    return wrapper

"""Example calls of ops.spike_count. See ops/parity.py for what dtypes and requires_grad mean."""

import torch

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def examples(size):
    """[(function, args, kwargs)] of a size: "small" (seconds anywhere) or "mid".

    The mean of |x| is a power of two in any dtype and order, so that counts are the same in all of them.
    """
    shapes = {"small": [(9, 33), (2, 3, 64)], "mid": [(64, 64), (500, 3584), (3, 18944)]}[size]
    calls = []
    for shape in shapes:
        whole = 0.5 * torch.ones(*shape[:-1], 1)
        for k, options in ((1.0, {}), (3.0, {}), (3.0, {"mean_abs": whole})):
            calls += [(name, (_even(*shape),), {"k": k, **options}) for name in ("spike_count", "spike_values")]
    return calls


def _even(*shape):
    """Numbers of either sign whose sizes are 1 + d and 1 - d in pairs, d in 64ths; an odd one out is 1."""
    pairs = torch.randint(-64, 65, (*shape[:-1], shape[-1] // 2)) / 64.0
    sizes = torch.cat([1 + pairs, 1 - pairs, torch.ones(*shape[:-1], shape[-1] % 2)], -1)
    signs = torch.randint(0, 2, shape) * 2 - 1
    return (sizes * signs).double().requires_grad_()

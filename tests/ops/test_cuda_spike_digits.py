"""Hopper's counting kernel on a GPU: digits, thresholds and flags of counts of any size, against plain torch."""

import pytest
import torch
from torch.nn.functional import pad

from ops import tuning
from test_cuda_backends import cuda_module, poison

pytestmark = pytest.mark.gpu

MOST = 2147483520
CASES = [(size, torch.bfloat16) for size in (128, 640, 3584, 18944, 32768)]
CASES += [(3584, torch.float16), (3584, torch.float32)]


@pytest.fixture
def digits_of():
    """digits_of(x, mean, all_digits, k) -> (count, threshold, digits, blocks); a skip where the kernel is not used."""
    cuda_module("spike_linear")
    from ops.spike_linear import hopper
    from ops.spike_linear.launch import Call

    if not hopper.is_hopper(torch.device("cuda")):
        pytest.skip(f"counting like this is for Hopper and Triton {hopper.TRITON}x")
    entry = tuning.tiles("spike_linear", "cuda")["digits_early"]

    def run(x, mean=None, *, all_digits=False, k=3.0):
        made = hopper.HopperDigits(x.shape[1], entry, all_digits=all_digits)
        return made(Call(x, x[:1], None, k, None, mean))

    return run


def tokens(size, dtype):
    """Ties, counts of two to four digits at either end, zeros, NaN and infinity; the rest is normal."""
    x = torch.randn(64, size, device="cuda")
    x[10:30] = torch.randint(-64, 65, (20, size), device="cuda") / 32.0
    x[1::7, size // 3] = 60.0
    x[3, 5], x[4], x[5, 7], x[6, size - 1] = 30000.0, 0.0, float("nan"), float("-inf")
    x[7, :: max(1, size // 9)] = -2000.0
    x[8, size - 1] = 300.0
    return x.to(dtype)


def counts(x, threshold):
    """int64 counts of the tokens, as ops.spike_count rounds."""
    ratio = (x.float() / threshold[:, None]).round()
    return torch.where(ratio.isfinite(), ratio, 0.0).clamp(-MOST, MOST).long()


def split(count):
    """(five digits in base 256, how many more than one a token has, flags of the blocks that have them)."""
    planes, most, flags = [], torch.zeros_like(count[:, 0]), 0
    num_words = -(-count.shape[1] // 4096)
    for place in range(5):
        planes.append((count + 128) % 256 - 128)
        count = (count - planes[-1]) // 256
        most = torch.where(count.any(1), place + 1, most)
        blocks = pad(count, (0, 4096 * num_words - count.shape[1])).unflatten(1, (-1, 32, 128)).any(-1)
        flags = flags | (blocks.long() << torch.arange(32, device="cuda")).sum(-1)
    return planes, most, flags


@pytest.mark.parametrize("all_digits", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("size, dtype", CASES)
def test_digits(digits_of, size, dtype, given, all_digits):
    x = tokens(size, dtype)
    mean = None
    if given:  # a part of its tokens; with k = 1, halves are ties
        mean = x.float().abs().nan_to_num(1.0, 1.0, 1.0).mean(-1)
        mean[10:30] = 0.5
        mean[3], mean[9] = 1e-5, float("inf")  # counts beyond int32, and none
    poison()
    count, threshold, digits, blocks = digits_of(x, mean, all_digits=all_digits, k=1.0 if given else 3.0)
    fine = x.isfinite().all(1)
    if given:
        fine[9] = False
    assert threshold[~fine].isnan().all() and threshold[fine].isfinite().all()
    level = (x.float().abs().mean(-1) if mean is None else mean).to(dtype).float()
    ideal = (level / torch.full_like(level, 1.0 if given else 3.0)).clamp(1e-5, 1e4)
    limit = 0.0 if given else 2**-7 if dtype == torch.bfloat16 else 2**-10  # a mean rounds to its neighbor
    assert ((threshold - ideal).abs() <= limit * ideal)[fine].all()
    planes, most, flags = split(counts(x, threshold)[fine])
    assert most.max() >= (4 if given else 1) and (most == 0).any()
    assert torch.equal(digits[fine].long(), most)
    more = most > 0
    assert torch.equal((blocks[fine].long() & 0xFFFFFFFF)[more], flags[more])
    assert torch.equal(count[0][fine].long(), planes[0])
    for place in range(1, 5 if all_digits else 1):
        assert torch.equal(count[place][fine].long()[more], planes[place][more])


def test_in_a_graph(digits_of):
    """It starts before the kernel that writes x ends, and must wait for it; the next writer must wait for its reads."""
    source = torch.randn(512, 3584, device="cuda").bfloat16()
    x = torch.zeros_like(source)
    wanted = digits_of(source)[0]
    digits_of(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = []
        for _ in range(4):
            x.copy_(source)
            found.append(digits_of(x)[0])
            x.fill_(7.0)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(count, wanted) for count in found)

"""Speed, side by side with the peers that are installed: a table on the console and a JSON file in out=DIR.

python launch/bench.py train    [model=7b layers=8 seq_len=8192 micro_batch=1 sp=1 patterns=LS,F peers=hand,engine
                                rounds=2 steps=10 warmup=4 recompute=none,full precision=bf16 profile=false
                                peak_tflops=0 out=DIR]
                                [ep=1 rows=1 expert_load=natural hot_share=0.5 experts.max_copies=0: layers marked :m]
python launch/bench.py prefill  [model=7b layers=4 seq_len=32768,131072 patterns=F,LS steps=5 warmup=2 ... out=DIR]
                                [sp=1 cache=false]
python launch/bench.py links    [model=7b shard_tokens=32768 sp=2,4,8,...,128 network=8:25 out=DIR]
python launch/bench.py ops      [ops=gla,attention backends=cuda,reference lengths=8192,32768,131072 peers=true
                                passes=forward,both dtype=bf16 model=7b steps=20 warmup=3 error_tokens=8192
                                time_limit_s=120 seed=0 out=DIR]
                                [tune=true kernels=outputs tune_limit_s=300: write the fastest tiles instead]
python launch/bench.py watch    [every=0,10,1 model=7b layers=8 pattern=LS seq_len=8192 micro_batch=1 rows=1 steps=20
                                rounds=5 recompute=none precision=bf16 out=DIR]
python launch/bench.py checkpoint [model=7b layers=0 dp=8 snapshots=5 writes=1 peers=sync,async
                                folder=DIR out=DIR]
python launch/bench.py saving   [model=7b layers=8 pattern=LS seq_len=8192 micro_batch=1 rows=1 steps=10 saves=2
                                recompute=none precision=bf16 folder=DIR out=DIR]
python launch/bench.py int8     [model=7b layers=28 pattern=LS prompts=8192,32768 weights=plain,floats,int8 decode=32
                                weight_group=128 spike_down_proj=false chunk_tokens=4096 steps=5 warmup=2 out=DIR]

Several GPUs: `torchrun --nproc_per_node 4 launch/bench.py train peers=engine sp=1,4,4:zeco,4:ulysses`, `... prefill
sp=1,4` and `... links`. With sp=1 every GPU has its own row or prompt of seq_len tokens, with sp=4 its part of one of
4 * seq_len: the same number of tokens.
"""

import os
import shlex
import sys

import _allocator  # noqa: F401
import _path  # noqa: F401
from parallel.mesh import end_distributed
from sbtrain.bench.checkpoint import CheckpointOptions, bench_checkpoint
from sbtrain.bench.int8 import Int8Options, bench_int8
from sbtrain.bench.links import LinkOptions, bench_links
from sbtrain.bench.ops import OpsOptions, bench_ops
from sbtrain.bench.options import parse
from sbtrain.bench.prefill import PrefillOptions, bench_prefill
from sbtrain.bench.saving import SavingOptions, bench_saving
from sbtrain.bench.train import TrainOptions, bench_train
from sbtrain.bench.watch import WatchOptions, bench_watch

BENCHMARKS = {
    "train": (TrainOptions, bench_train),
    "prefill": (PrefillOptions, bench_prefill),
    "links": (LinkOptions, bench_links),
    "ops": (OpsOptions, bench_ops),
    "watch": (WatchOptions, bench_watch),
    "checkpoint": (CheckpointOptions, bench_checkpoint),
    "saving": (SavingOptions, bench_saving),
    "int8": (Int8Options, bench_int8),
}
"""Subcommand -> its keys, and what runs it: run(options, command) -> exit code."""


def main(arguments: list[str]) -> int:
    """Run a benchmark; the exit code. Rank 0 says why arguments are refused."""
    try:
        if not arguments or arguments[0] not in BENCHMARKS:
            given = arguments[0] if arguments else "nothing"
            raise ValueError(f"{given} is not a benchmark; write one of: {', '.join(BENCHMARKS)}, then key=value ...")
        options, run = BENCHMARKS[arguments[0]]
        num_ranks = os.environ.get("LOCAL_WORLD_SIZE")
        start = ["torchrun", f"--nproc_per_node={num_ranks}"] if num_ranks else ["python"]
        import torch.distributed as dist

        ours = not dist.is_initialized()
        code = run(parse(options, arguments[1:]), shlex.join([*start, "launch/bench.py", *arguments]))
        if code == 0 and ours:
            end_distributed()
        return code
    except ValueError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

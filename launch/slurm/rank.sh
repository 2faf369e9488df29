#!/usr/bin/env bash
# What srun starts once a GPU: tells torch.distributed where this process stands, then becomes the command.
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
exec "$@"

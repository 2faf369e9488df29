"""What the cluster calls this job."""

from __future__ import annotations

import os


def job_id() -> str:
    """Number of the Slurm job, with the index within an array; empty outside of Slurm."""
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{index}" if array and index else os.environ.get("SLURM_JOB_ID", "")

"""Suite lm_eval: tasks of EleutherAI's lm-evaluation-harness, on the model as transformers runs it.

The harness is optional. It gets a Hugging Face folder: the given one, or an export of the run's checkpoint.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sbtrain.checkpoint.run_dir import open_run
from sbtrain.convert.export import export_checkpoint
from sbtrain.inference.load import Where

INSTALL = "pip install lm-eval==0.4.13"


@dataclass(frozen=True)
class HarnessOptions:
    """What the harness runs.

    tasks: names of its tasks. include_path: a folder with task files of your own, which need no network.
    limit: documents per task, 0 for all. num_fewshot: examples before each question, -1 as the task says.
    batch_size: sequences at a time.
    """

    tasks: tuple[str, ...] = ()
    include_path: str = ""
    limit: int = 0
    num_fewshot: int = -1
    batch_size: int = 1


def check(where: Where, options: HarnessOptions) -> None:
    """Raise ValueError when the harness is not installed, or tasks are missing or not known to it."""
    where.refuse_int8("suite lm_eval runs the model through transformers")
    _, task_manager = _harness()
    if not options.tasks:
        raise ValueError("suite lm_eval needs tasks=NAME[,NAME...]; `lm-eval ls tasks` lists them")
    if options.include_path and not Path(options.include_path).is_dir():
        raise ValueError(f"include_path={options.include_path} is not a folder; give one that holds task files")
    known = task_manager(include_path=options.include_path or None).all_tasks
    unknown = next((task for task in options.tasks if task not in known), None)
    if unknown:
        place = f" and {options.include_path}" if options.include_path else ""
        raise ValueError(f"tasks: {unknown} is not a task of lm-eval{place}; `lm-eval ls tasks` lists them")


def run(where: Where, options: HarnessOptions) -> dict:
    """{results: {task: {metric: value}}, versions, num_samples}. A run's checkpoint is exported for the time of it."""
    simple_evaluate, task_manager = _harness()
    on_gpu = torch.cuda.is_available()
    with _folder(where) as folder:
        report = simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(folder),
                "trust_remote_code": True,
                "dtype": _dtype(where, on_gpu=on_gpu),
            },
            tasks=list(options.tasks),
            task_manager=task_manager(include_path=options.include_path or None),
            limit=options.limit or None,
            num_fewshot=options.num_fewshot if options.num_fewshot >= 0 else None,
            batch_size=options.batch_size,
            device="cuda" if on_gpu else "cpu",
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {
        "results": report["results"],
        "versions": report.get("versions", {}),
        "num_samples": {task: count["effective"] for task, count in report.get("n-samples", {}).items()},
    }


def table(report: dict) -> str:
    """task, metric, value."""
    lines = [f"{'task':32}{'metric':32}{'value':>10}"]
    for task, metrics in report["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                lines.append(f"{task:32}{name.split(',')[0]:32}{value:>10.4f}")
    return "\n".join(lines)


def _harness():
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"suite lm_eval needs the harness ({error}); install it: {INSTALL}") from None
    return simple_evaluate, TaskManager


@contextmanager
def _folder(where: Where) -> Iterator[Path]:
    if where.model:
        yield Path(where.model)
        return
    recipe, step_dir = open_run(where.run, where.step)
    with tempfile.TemporaryDirectory(dir=where.folder, prefix="lm_eval_export_") as scratch:
        folder = Path(scratch) / "export"
        export_checkpoint(step_dir, recipe=recipe, out=folder, dtype=where.precision or recipe.precision.value)
        yield folder


def _dtype(where: Where, *, on_gpu: bool) -> str:
    precision = where.precision or ("bf16" if on_gpu else "fp32")
    return {"bf16": "bfloat16", "fp32": "float32"}[precision]

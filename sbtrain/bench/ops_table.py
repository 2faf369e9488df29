"""The rows of `bench.py ops` as text: one line while it runs, a table at the end."""

from __future__ import annotations

from sbtrain.bench.record import aligned, shown

HEADER = ("op", "tokens", "pass", "version", "ms", "min", "rate", "unit", "ceiling", "GiB", "error", "gradient error")
HEADER += ("speed / ours",)
DIFFERENCE_LIMIT = 2e-2
"""Between two bf16 versions, each within 1e-2 of the truth."""
PASS_NAMES = {"forward": "fwd", "both": "fwd+bwd"}


def line(row: dict) -> str:
    """One row in words, to follow a run by."""
    start = f"{_title(row)} {row['num_tokens']} {PASS_NAMES[row['pass']]} {row['version']}"
    if "problem" in row:
        return f"{start}: not measured, {row['problem']}"
    speed = f"{row['ms']['median']:.3f} ms, {_rate(row)} {row['unit']}, {row['of_ceiling']:.1%} of the ceiling"
    return f"{start}: {speed}, error {_errors(row)}"


def summary(rows: list[dict]) -> str:
    """A table of what was measured, then why the rest was not, then what needs a look."""
    parts = [aligned(HEADER, [_cells(row) for row in rows if "problem" not in row])]
    reasons: dict[tuple, list[str]] = {}
    for row in rows:
        if "problem" in row:
            where = f"{_title(row)} {row['num_tokens']} {PASS_NAMES[row['pass']]}"
            reasons.setdefault((row["version"], row["problem"]), []).append(where)
    if reasons:
        lines = [f"  {version}: {why} ({_places(where)})" for (version, why), where in reasons.items()]
        parts.append("\n".join(["Not measured:", *lines]))
    lengths = sorted({row["error_tokens"] for row in rows if "error_tokens" in row})
    if lengths:
        parts.append(
            "Errors are relative norms against the float64 reference on the same inputs, at the timed length or, where "
            f"that is longer, at {' or '.join(map(str, lengths))} tokens (JSON: error_tokens)."
        )
    alarms = _alarms(rows)
    if alarms:
        parts.append("\n".join(["Look at these:", *(f"  {text}" for text in alarms)]))
    return "\n\n".join(parts)


def _alarms(rows: list[dict]) -> list[str]:
    alarms = []
    for row in rows:
        name = f"{_title(row)} {row['num_tokens']} {PASS_NAMES[row['pass']]} {row['version']}"
        if row["wrong"] and "problem" not in row:
            alarms.append(f"{name}: error {_errors(row)} is more than rounding")
        elif row["wrong"]:
            alarms.append(f"{name}: {row['problem']}")
        elif row["ours"] and row.get("repeats") is False:
            alarms.append(f"{name}: two backward passes on the same inputs differ")
        if not (row.get("difference") or 0.0) <= DIFFERENCE_LIMIT:
            alarms.append(f"{name}: differs by {row['difference']:.1e} from our first version at this length")
    return alarms


def _title(row: dict) -> str:
    return f"{row['op']} {row['case']}".rstrip()


def _errors(row: dict) -> str:
    found = shown(row.get("error"), ".1e")
    return f"{found} / {row['gradient_error']:.1e} ({row['worst_gradient']})" if "gradient_error" in row else found


def _rate(row: dict) -> str:
    return f"{row['rate']:.0f}" if row["rate"] >= 100 else f"{row['rate']:.3g}"


def _cells(row: dict) -> tuple[str, ...]:
    memory = row["peak_memory_bytes"]
    gradient = row.get("gradient_error")
    return (
        _title(row),
        f"{row['num_tokens']}",
        PASS_NAMES[row["pass"]],
        row["version"],
        f"{row['ms']['median']:.3f}",
        f"{row['ms']['min']:.3f}",
        _rate(row),
        row["unit"],
        f"{row['of_ceiling']:.1%}",
        shown(memory if memory is None else memory / 2**30, ".3f"),
        shown(row.get("error"), ".1e"),
        shown(gradient, ".1e") if gradient is None else f"{gradient:.1e} {row['worst_gradient']}",
        shown(row["speed_against_ours"], ".2f"),
    )


def _places(where: list[str]) -> str:
    return ", ".join(where) if len(where) <= 3 else f"{', '.join(where[:2])} and {len(where) - 2} more"

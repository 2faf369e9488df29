"""The first hour with a card that nobody here has: each op's parity with its reference, in a process of its own.

python launch/first_boot.py [backend=maca|cuda|reference] [ops=gla,rope] [sizes=small,mid] [timeout_s=300]
                            [oracle=cpu|device] [out=runs/first_boot] [mark=true]

Prints what this machine is, then a line for each op and size. A process that hangs is killed after timeout_s and the
next one starts. OUT/status.json is written anew after every process, OUT/logs/ has their output. mark=true writes the
tune entries of ops that passed in every size into the section of this device, as measured. Exit code 0 when nothing was
wrong, hung or crashed, 1 otherwise, 2 for bad arguments.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import _path  # noqa: F401
from ops import scan, tuning
from ops.device import EnvFacts
from ops.discover import descriptors
from ops.parity import SIZES

ROOT = Path(__file__).resolve().parent.parent
KEYS = {
    "backend": "",
    "ops": "",
    "sizes": ",".join(SIZES),
    "timeout_s": "300",
    "oracle": "cpu",
    "out": "runs/first_boot",
    "mark": "false",
}
GOOD = ("ok", "refused", "no examples")
PATIENCE_S = 10
"""How long a killed process may take to die: one that waits inside a driver may never do so."""


def parse(arguments: list[str]) -> dict:
    """The keys with their values. Raises ValueError naming a key that does not exist or has a value that none may."""
    options = dict(KEYS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in KEYS or not equals:
            raise ValueError(f"{argument}: must be key=value with one of: {', '.join(KEYS)}")
        options[key] = value
    options["ops"] = options["ops"].split(",") if options["ops"] else list(scan())
    options["sizes"] = options["sizes"].split(",")
    choices = {"backend": ["", *descriptors()], "oracle": ["cpu", "device"], "mark": ["true", "false"]}
    lists = {"ops": list(scan()), "sizes": list(SIZES)}
    for key, known in {**choices, **lists}.items():
        values = options[key] if key in lists else [options[key]]
        unknown = next((value for value in values if value not in known), None)
        if unknown is not None:
            raise ValueError(f"{key}={unknown}: choose from: {', '.join(name for name in known if name)}")
    if not options["timeout_s"].isdigit() or options["timeout_s"] == "0":
        raise ValueError(f"timeout_s={options['timeout_s']}: must be a number of seconds")
    return {**options, "timeout_s": int(options["timeout_s"]), "out": Path(options["out"])}


def run(name: str, words: list[str], options: dict) -> dict:
    """The JSON that `python -m ops.parity` leaves, with seconds; else {"status": "hung" or "crashed", "note": ...}."""
    log, result = options["out"] / "logs" / f"{name}.txt", options["out"] / "logs" / f"{name}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if options["backend"]:
        environment["OPS_BACKEND"] = options["backend"]
    command = [sys.executable, "-m", "ops.parity", *words, str(result.absolute())]
    command += ["device"] if options["oracle"] == "device" and words[0] != "facts" else []
    start = time.monotonic()
    with open(log, "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(options["timeout_s"])
        except subprocess.TimeoutExpired:
            return {"status": "hung", "note": kill(process, options["timeout_s"])}
    seconds = round(time.monotonic() - start, 1)
    if code == 0 and result.is_file():
        return {**json.loads(result.read_text()), "seconds": seconds}
    why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    return {"status": "crashed", "note": ": ".join([why, *last]), "seconds": seconds}


def kill(process: subprocess.Popen, timeout_s: int) -> str:
    """End a process and all it has started; says whether it did end."""
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout_s} s, and it cannot be killed: look at the driver, restart the machine"
    return f"no answer in {timeout_s} s, killed"


def line(op: str, size: str, found: dict) -> str:
    """One row of the table on the console."""
    errors = [case["error"] for case in found.get("cases", []) if case.get("error") is not None]
    worst = f"{max(errors):.1e}" if errors else "-"
    note = found.get("note", "emulated" if found.get("emulated") else "")
    wrong = [f"{case['function']} {case['dtype']}" for case in found.get("cases", []) if case["status"] == "wrong"]
    note = f"wrong: {', '.join(sorted(set(wrong)))}" if wrong else note
    cells = (op.ljust(21), found.get("backend", "-").ljust(9), size.ljust(5), found["status"].ljust(11), worst.ljust(7))
    return "  ".join([*cells, f"{found.get('seconds', '-')!s:>6} s", note]).rstrip()


def write(out: Path, status: dict) -> None:
    """status.json, replaced as a whole: a machine that dies leaves the last one."""
    partial = out / "status.json.partial"
    partial.write_text(json.dumps(status, indent=1))
    partial.replace(out / "status.json")


def mark(status: dict) -> list[str]:
    """Write the tune entries of ops that passed as measured; one sentence for each op."""
    facts = EnvFacts.from_json(status["machine"]["facts"])
    source = f"parity on {facts.device_name or 'cpu'}, torch {facts.torch_version}, {status['date']}"
    told = []
    for op, sizes in status["ops"].items():
        states, backend = [found["status"] for found in sizes.values()], next(iter(sizes.values())).get("backend")
        if any(found.get("emulated") for found in sizes.values()):
            told.append(f"{op}: not marked, emulated")
        elif set(states) != {"ok"} or backend == "reference":
            told.append(f"{op}: not marked, {backend or 'nothing'} was {' and '.join(sorted(set(states)))}")
        else:
            path = tuning.mark_measured(op, backend, facts, source)
            told.append(f"{op}: measured, {path}" if path else f"{op}: has no tune file")
    return told


def main(arguments: list[str]) -> int:
    """Describe this machine, check every op and write what was found; the exit code."""
    try:
        options = parse(arguments)
        (options["out"] / "logs").mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = run("facts", ["facts"], options)
    status = {"date": datetime.date.today().isoformat(), "backend": options["backend"], "machine": machine, "ops": {}}
    write(options["out"], status)
    if "facts" not in machine:
        print(f"error: this machine cannot be described: {machine['status']}, {machine['note']}", file=sys.stderr)
        return 1
    print(EnvFacts.from_json(machine["facts"]).describe())
    print(f"{machine['backend']}: {machine['reason']}\nlimits: {machine['limits']}\n")
    for op in options["ops"]:
        for size in options["sizes"]:
            found = run(f"{op}_{size}", [op, size], options)
            status["ops"].setdefault(op, {})[size] = found
            write(options["out"], status)
            print(line(op, size, found), flush=True)
    if options["mark"] == "true":
        status["marked"] = mark(status)
        write(options["out"], status)
        print("\n" + "\n".join(status["marked"]))
    print(f"\n{options['out'] / 'status.json'}")
    return 0 if all(found["status"] in GOOD for sizes in status["ops"].values() for found in sizes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

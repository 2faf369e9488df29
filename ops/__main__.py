"""`python -m ops`: the device facts, its limits, and op x backend with the reason for every choice and refusal."""

import sys

from ops.device import collect
from ops.discover import descriptors
from ops.explain import rows, table_hash
from ops.select import platform


def main() -> int:
    """Print facts, limits, table and table hash. Returns the exit code."""
    try:
        facts = collect()
        print(facts.describe())
        cells = [("op", "backend", "", "reason"), *rows()]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    name, _ = platform(facts, descriptors())
    print(f"limits of {name}: {descriptors()[name].limits_on(facts).describe()}")
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    for row in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))
    print(f"table {table_hash()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

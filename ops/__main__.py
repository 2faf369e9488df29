"""`python -m ops`: the device facts, and op x backend with the reason for every choice and refusal."""

from ops.device import collect
from ops.registry import rows, table_hash


def main() -> None:
    """Print facts, table and table hash."""
    print(collect().describe())
    cells = [("op", "backend", "", "reason"), *rows()]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    for row in cells:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))
    print(f"table {table_hash()}")


if __name__ == "__main__":
    main()

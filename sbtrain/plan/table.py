"""Tables as plain text, for a terminal."""

from __future__ import annotations


def table(header: tuple[str, ...], rows: list[tuple[str, ...]], *, left: tuple[int, ...], indent: int = 0) -> str:
    """Columns as wide as their widest cell; `left` names the left-aligned ones. indent: columns before the first."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        return " " * indent + "  ".join(cells).rstrip()

    return "\n".join([line(header), " " * indent + "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])

"""A table that prints as plain text, or with rules if `rich` prints it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows and a footer of totals, tuples of strings as long as `columns`.

    The columns in `right` are aligned to the right, as numbers are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[tuple[str, ...], ...]
    right: tuple[str, ...]

    def __str__(self) -> str:
        lines = (self.columns, *self.rows, *self.footer)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = (
            "  ".join(
                cell.rjust(width) if column in self.right else cell.ljust(width)
                for column, cell, width in zip(self.columns, line, widths, strict=True)
            )
            for line in lines
        )
        return "\n".join(line.rstrip() for line in aligned)

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable()
        for column in self.columns:
            table.add_column(column, justify="right" if column in self.right else "left")
        for i, line in enumerate((*self.rows, *self.footer), 1):
            table.add_row(*map(Text, line), end_section=i == len(self.rows))
        return table

"""A table that prints as plain text, and with rules where `rich` prints it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of strings, each as long as `columns`.

    Attributes:
        columns: the headings.
        rows: what stands below them.
        footer: rows of totals.
        right: the columns that are aligned to the right, as numbers are.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footer: tuple[tuple[str, ...], ...] = ()
    right: tuple[str, ...] = ()

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
        """The table of `rich`, which calls this when it prints."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable()
        for column in self.columns:
            table.add_column(column, justify="right" if column in self.right else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        table.add_section()
        for row in self.footer:
            table.add_row(*map(Text, row))
        return table

"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: bool = False
) -> list[str]:
    """Lines of a table; with `figures`, all columns but the first are aligned to the right."""
    rule = "|---|" + "--:|" * (len(columns) - 1) if figures else "|---" * len(columns) + "|"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]

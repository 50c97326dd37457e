"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, figures: int = 0) -> list[str]:
    """Lines of a table, with the columns from number `figures` on aligned to the right, if any."""
    text = figures or len(columns)
    rule = "|---" * text + "|" + "--:|" * (len(columns) - text)
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]

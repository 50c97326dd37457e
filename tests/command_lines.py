"""How the tests of the examples look at their errors."""

import pytest


def one_line_error(main, flags, capsys):
    """Runs a command that must fail; returns its status, what it printed before, and the line."""
    with pytest.raises(SystemExit) as exit_info:
        main(flags)
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert "error: " in line
    return exit_info.value.code, printed.out, line

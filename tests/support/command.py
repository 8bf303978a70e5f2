"""A command of cli/ in the test's own process, which has imported already what each start would import again."""

import io
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout

import pytest


def run_here(
    main: Callable[[], int], *arguments: str, variables: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """What the command prints, and its exit status; it has no terminal, and these variables beside the process's."""
    output, error = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(error):
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["", *arguments])
        patch.setattr(sys, "stdin", io.StringIO())
        try:
            status = main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            status = end.code
    return subprocess.CompletedProcess(arguments, status, output.getvalue(), error.getvalue())

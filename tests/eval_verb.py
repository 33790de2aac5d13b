"""Runs a verb of ``tokenmill eval`` in this process."""

from typer.testing import CliRunner

from tokenmill.cli import app


def run_eval(*arguments):
    """Standard output of ``tokenmill eval ARGUMENTS``; raises what the verb raises."""
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output

"""The command line in this process: what it prints, and how it fails."""

from sborax.cli import main


def fails(capsys, *argv) -> str:
    """The one line of an error, after its `error: `."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    return errors[0].removeprefix("error: ")


def prints(capsys, *argv) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out

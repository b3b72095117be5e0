"""The command as a whole: help, errors, exit codes, start-up."""

import subprocess
import sys

import pytest

from cli.main import COMMANDS, load, run

HEAVY = ("torch", "polars", "pyarrow", "dask", "distributed", "open_clip", "transformers", "numpy", "cv2", "pandas")


def leaves(command, path):
    """(words, command) of every command below."""
    children = getattr(command, "commands", None)
    if not children:
        return [(path, command)]
    return [leaf for name, child in children.items() for leaf in leaves(child, [*path, name])]


EVERY = [leaf for name in COMMANDS for leaf in leaves(load(name), [name])]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_finds_every_command(name):
    assert load(name) is not None


@pytest.mark.parametrize(("words", "command"), EVERY, ids=[" ".join(w) for w, _ in EVERY])
def test_every_command_has_help_an_example_and_described_options(words, command):
    assert command.help
    assert f"Example: pairmill {' '.join(words)}" in command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), f"{words}: {parameter.name} has no help"


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS if name not in ("demo",))])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom cli.main import run\n"
        f"code = run([*{words!r}, '--help'])\n"
        f"print('HEAVY', sorted(m for m in {HEAVY!r} if m in sys.modules), code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "HEAVY [] 0"


@pytest.mark.parametrize("words", [["--version"], ["filter", "--version"]])
def test_version(words, capsys):
    assert run(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("pairmill ")
    for name in ("torch", "CUDA", "detectron2"):
        assert name in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["downlod"], "Did you mean `download`?"),
        (["filter"], "Missing argument"),
        (["filter", "nowhere", "-o", "x"], "nowhere is not a dataset"),
        (["filter", "nowhere", "--tpo", "0.3"], "No such option"),
        (["train", "clip-tin", "x", "-o", "y"], "Did you mean `clip-tiny`?"),
        (["extract", "patches", "x", "--size", "100"], "multiple of `patch`"),
    ],
)
def test_what_a_user_can_mend_has_exit_code_2_and_no_traceback(words, message, capsys):
    assert run(words) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error


def test_an_interrupt_has_exit_code_130(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("training.registry.model_rows", interrupted)
    assert run(["models"]) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("training.registry.model_rows", broken)
    with pytest.raises(ZeroDivisionError):
        run(["models"])


def test_models_lists_the_registry(capsys):
    assert run(["models"]) == 0
    out = capsys.readouterr().out
    assert "151,277,313" in out
    assert "vilt-tiny" in out

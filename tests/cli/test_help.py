"""--help, --version and no command: groups, examples, the next step."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import DOCUMENT, edited, write
from typer.testing import CliRunner

from skipsearch import SkipMask, cli
from skipsearch.cli.help import COMMANDS, GROUPS, OWN
from skipsearch.maskfile import MaskFile, ModelCard, load_mask

runner = CliRunner()
GROUP: Any = typer.main.get_command(cli.app)
WIDTHS = [40, 80, 200]


def shown(*arguments: str, width: int = 80) -> str:
    found = runner.invoke(cli.app, [*arguments, "--help"], terminal_width=width, prog_name="skipsearch")
    assert found.exit_code == 0, found.output
    return found.stdout


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_example_is_right(name: str) -> None:
    """Prevents an example that the command refuses, that names another command, or that is broken into lines."""
    example = GROUP.commands[name].epilog
    program, command, *arguments = shlex.split(example)
    assert (program, command) == ("skipsearch", name)
    GROUP.commands[name].make_context(name, arguments)
    assert all(f"\nExample:\n  {example}\n" in shown(name, width=width) for width in WIDTHS)


@pytest.mark.parametrize("name", GROUP.commands)
def test_every_option_is_shown_once(name: str) -> None:
    """Prevents an option that a group swallows, or an escape code where there is no colour."""
    text = shown(name)
    assert "\x1b" not in text and all(len(line) <= 80 or line.startswith("  skipsearch ") for line in text.splitlines())
    for param in GROUP.commands[name].params:
        for option in (*param.opts, *param.secondary_opts):
            if option.startswith("--"):
                assert sum(option in line.replace(",", " ").split()[:4] for line in text.splitlines()) >= 1, option


def test_the_groups_know_the_commands_and_options() -> None:
    """Prevents a new command that --help leaves out, and a group that lists what is gone."""
    assert sorted(" ".join(COMMANDS.values()).split()) == sorted(GROUP.commands)
    assert all(f"\n{title}:\n" in shown() for title in COMMANDS)
    options = {o.lstrip("-") for c in GROUP.commands.values() for p in c.params for o in p.opts} | {"help"}
    assert set(" ".join(GROUPS.values()).split()) <= options
    for name, groups in OWN.items():
        own = {option.lstrip("-") for param in GROUP.commands[name].params for option in param.opts}
        assert set(" ".join(groups.values()).split()) <= own, name
    run = shown("run")
    titles = ["What to search", "What to measure on", "Budgets", "Output", "Example"]
    assert sorted(titles, key=lambda title: run.index(f"\n{title}:\n")) == titles and "\nOptions:" not in run


def test_version() -> None:
    """Prevents a version that differs from the installed package's."""
    assert runner.invoke(cli.app, ["--version"]).stdout.strip() == version("skipsearch")


def test_no_command_says_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a page of help where one line is wanted, and advice to use what did not pay."""
    monkeypatch.chdir(tmp_path)
    found = runner.invoke(cli.app, [])
    assert found.exit_code == 0 and "Next: skipsearch run --model demo" in found.stdout
    path = Path("results/demo/mask.json")
    path.parent.mkdir(parents=True)
    file = MaskFile.of(SkipMask(attention=[1], mlp=[2], num_layers=4), model=ModelCard(id="demo", num_layers=4))
    file.save(path)
    assert f"Next: skipsearch validate {path} --model demo" in runner.invoke(cli.app, []).stdout
    for verdict, wanted in (("use", f"generate --model demo --mask {path}"), ("do not use", "more --trials")):
        write(path, edited("evidence.verdict", verdict))
        found = runner.invoke(cli.app, [])
        assert wanted in found.stdout and f"{path}: {verdict}, 1.25x" in found.stdout, found.output
    for known, told in ((DOCUMENT["evidence"], False), (load_mask(path).evidence.model_dump(mode="json"), True)):
        write(path.with_name("summary.json"), {"evidence": known, "next": "skipsearch generate --model ./mine"})
        assert ("--model ./mine" in runner.invoke(cli.app, []).stdout) == told
    begun = Path("results/other/trace.json")
    begun.parent.mkdir()
    begun.touch()
    assert "results/other: a run that has not finished" in runner.invoke(cli.app, []).stdout


@pytest.mark.parametrize(
    "arguments", [["show", "missing.json"], ["show", "--nonsense"], ["run"], ["validate", "m.json"]]
)
def test_errors_as_json(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Prevents an empty stdout for a script that reads JSON, and a changed exit code or message on stderr."""
    monkeypatch.setattr(sys, "argv", ["skipsearch", *arguments, "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert stop.value.code == (1 if arguments[-1].endswith(".json") else 2)
    assert error and error.split(".")[0] in said.err

"""The command line: exit codes, one JSON object on stdout, one line per error."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from documents import EVIDENCE, write
from typer.testing import CliRunner

from skipsearch import cli
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard, load_mask

runner = CliRunner()
COMMANDS = ["run", "worker", "generate", "validate", "show", "report", "import", "models", "dashboard", "doctor"]


@pytest.fixture
def mask_path(tmp_path: Path) -> Path:
    path = tmp_path / "mask.json"
    mask = SkipMask(attention=[4, 5, 9], mlp=[7, 8], num_layers=20)
    MaskFile.of(mask, model=ModelCard(id="demo", num_layers=20)).save(path)
    return path


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["skipsearch", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    """Prevents a command without help."""
    assert runner.invoke(cli.app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("arguments", [["nonsense"], ["show"], ["run", "--model", "demo", "--trials", "many"]])
def test_wrong_use_exits_2(arguments: list[str]) -> None:
    """Prevents wrong use from looking like a failed run."""
    assert runner.invoke(cli.app, arguments).exit_code == 2


def test_show_draws_both_rows_and_prints_json(mask_path: Path) -> None:
    """Prevents a picture with a missing row, and stdout with anything but the JSON object."""
    shown = runner.invoke(cli.app, ["show", str(mask_path)])
    assert shown.exit_code == 0 and "attention" in shown.output and "mlp" in shown.output
    assert "3 of 20 skipped" in shown.output
    data = json.loads(runner.invoke(cli.app, ["show", str(mask_path), "--json"]).stdout)
    assert data["skip"] == {"attention": [4, 5, 9], "mlp": [7, 8]}


def test_errors_are_one_line(mask_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Prevents a traceback for a truncated file."""
    mask_path.write_text(mask_path.read_text()[:50])
    assert run_main(monkeypatch, "show", str(mask_path)) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("error:") and "\n" not in message and "not whole JSON" in message


def test_import_of_a_published_skip_set(tmp_path: Path) -> None:
    """Prevents layer ids from changing during the import."""
    source = tmp_path / "skip_layers.json"
    source.write_text(json.dumps({"a": {"attention": [3, 5], "mlp": [6]}}))
    target = tmp_path / "out.json"
    result = runner.invoke(cli.app, ["import", str(source), "--layers", "8", "--to", str(target), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(target.read_text())["skip"] == {"attention": [3, 5], "mlp": [6]}


def test_models_lists_the_presets() -> None:
    """Prevents a preset from missing in the list."""
    assert {"demo", "llama-2-13b"} <= set(json.loads(runner.invoke(cli.app, ["models", "--json"]).stdout))


def test_generate_compares_with_plain_decoding(mask_path: Path) -> None:
    """Prevents a mask from changing the output tokens."""
    arguments = ["generate", "--model", "demo", "--max-new-tokens", "12", "--compare", "--json", "--mask"]
    result = runner.invoke(cli.app, [*arguments, str(mask_path)])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["greedy_equal"] is True and len(data["mask"]["tokens"]) == 12


def test_generate_says_what_it_compares_and_what_the_file_advises(mask_path: Path) -> None:
    """Prevents a comparison without its ratio, and silence about a file that says "do not use"."""
    arguments = ["generate", "--model", "demo", "--max-new-tokens", "12", "--compare", "--mask", str(mask_path)]
    plain = runner.invoke(cli.app, arguments)
    assert re.search(r"same tokens as plain decoding, [0-9.]+ times the speed", " ".join(plain.output.split()))
    assert "note:" not in plain.stderr
    data = json.loads(mask_path.read_text())
    del data["checksum"]
    write(mask_path, {**data, "evidence": {**EVIDENCE, "verdict": "do not use"}})
    said = runner.invoke(cli.app, arguments)
    assert said.exit_code == 0 and f"note: {mask_path} says 'do not use': the draft alone was" in said.stderr


@pytest.mark.parametrize("command", ["run --model demo", "validate MASK", "bench --model demo"])
def test_a_missing_prompt_file_is_told_before_the_model_is_loaded(
    command: str, mask_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Prevents minutes of loading before a mistyped name is told."""
    monkeypatch.setattr("skipsearch.cli.options.load", lambda *_: pytest.fail("the model was loaded"))
    arguments = command.replace("MASK", str(mask_path)).split()
    assert run_main(monkeypatch, *arguments, "--prompts", str(tmp_path / "none.jsonl")) == 1
    assert "none.jsonl does not exist" in capsys.readouterr().err
    assert run_main(monkeypatch, *arguments, "--prompts", "builtin:poems") == 1


def test_validate_takes_the_model_of_the_mask(mask_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a mask from being timed on the bundled model because --model was left out."""
    asked: list[str] = []

    def load(name: str, *_: Any) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr("skipsearch.cli.options.load", load)
    for given, wanted in (("demo", "demo"), ("meta-llama/Llama-2-13b-hf", "llama-2-13b")):
        MaskFile.of(SkipMask(attention=[1], num_layers=4), model=ModelCard(id=given, num_layers=4)).save(mask_path)
        assert run_main(monkeypatch, "validate", str(mask_path)) == 130
        assert asked.pop() == wanted
    MaskFile.of(SkipMask(attention=[1], num_layers=4), model=ModelCard(id="mine", num_layers=4)).save(mask_path)
    assert run_main(monkeypatch, "validate", str(mask_path)) == 2 and not asked  # the hub may hold another "mine"
    run_main(monkeypatch, "validate", str(mask_path), "--model", "./mine")
    assert asked == ["./mine"]


def test_the_prompt_is_printed_once_before_its_continuation() -> None:
    """Prevents the prompt from being passed to the streamer twice, by us and by `generate`."""
    arguments = ["generate", "--model", "demo", "--prompt", "zebra = 1", "--max-new-tokens", "6", "--backend", "eager"]
    shown = runner.invoke(cli.app, arguments).stdout
    text = json.loads(runner.invoke(cli.app, [*arguments, "--json"]).stdout)["plain"]["text"]
    assert shown.startswith("zebra = 1" + text) and shown.count("zebra = 1") == 1 + text.count("zebra = 1")


def test_generate_finds_masks_on_the_fly(tmp_path: Path, mask_path: Path) -> None:
    """Prevents a search that changes the output or reports nothing, and a saved file without a found mask."""
    arguments = ["generate", "--model", "demo", "--on-the-fly", "--backend", "eager", "--max-new-tokens", "40"]
    result = runner.invoke(cli.app, [*arguments, "--compare", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["greedy_equal"] is True and data["on the fly"]["search"]["share"] < 1
    saving = ["--save", str(tmp_path / "m.json")]
    needs = (["--share", "0.1"], ["--beam-width", "2"], ["--threshold", "0.1"], ["--draft-model", "demo"])
    for wrong in (saving, ["--explain"], *needs):
        assert runner.invoke(cli.app, ["generate", "--model", "demo", *wrong]).exit_code == 2, wrong
    missing = ["--save", str(tmp_path / "missing" / "m.json")]
    for wrong in (missing, ["--decoding", "mtad"]):
        assert runner.invoke(cli.app, [*arguments, *wrong]).exit_code == 2, wrong
    result = runner.invoke(cli.app, [*arguments, "--mask", str(mask_path), *saving])
    assert result.exit_code == 0 and "which nothing beat" in " ".join(result.output.split())
    assert load_mask(tmp_path / "m.json").model.id == "demo"


def test_generate_says_that_joint_decoding_is_lossy(mask_path: Path) -> None:
    """Prevents lossy output without a notice."""
    arguments = ["generate", "--model", "demo", "--decoding", "mtad", "--max-new-tokens", "12"]
    assert runner.invoke(cli.app, arguments).exit_code == 2  # nothing drafts
    result = runner.invoke(cli.app, [*arguments, "--mask", str(mask_path)])
    assert result.exit_code == 0 and "LOSSY" in result.output
    result = runner.invoke(cli.app, [*arguments, "--mask", str(mask_path), "--compare", "--json"])
    data = json.loads(result.stdout)
    assert data["mtad (lossy)"]["lossy"] is True and data["plain"]["lossy"] is False and data["greedy_equal"] is None
    assert "LOSSY" in " ".join(runner.invoke(cli.app, ["generate", "--help"]).output.split())


def test_dashboard_without_a_study_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Prevents an empty database from being created and served."""
    assert run_main(monkeypatch, "dashboard", str(tmp_path)) == 1
    assert "no study.db" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_interruption_exits_130_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Prevents Ctrl-C from looking like a crash."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("skipsearch.cli.options.load", interrupted)
    assert run_main(monkeypatch, "run", "--model", "demo") == 130
    assert "run the same command again" in capsys.readouterr().err


def test_a_dashboard_of_a_database_without_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:  # fmt: skip
    """Prevents reading from making a file, and a traceback for an empty one."""
    path = tmp_path / "none.db"
    assert run_main(monkeypatch, "dashboard", "--storage", f"sqlite:///{path}") == 1
    assert "does not exist" in capsys.readouterr().err and not path.exists()
    assert run_main(monkeypatch, "dashboard", "--storage", "postgresql+psycopg://x@127.0.0.1:1/none") == 1
    assert "cannot be opened" in (said := capsys.readouterr().err) and len(said.strip().splitlines()) <= 2
    path.touch()
    assert run_main(monkeypatch, "dashboard", "--storage", f"sqlite:///{path}") == 1
    assert "holds no study" in capsys.readouterr().err and path.stat().st_size == 0


def test_a_chat_template_is_not_printed_around_the_answer(tmp_path: Path, chatty: Any, demo: Any) -> None:
    """Prevents an answer that stands behind a screen of markers and a system message that the user did not write."""
    for part in (demo.model, chatty):
        part.save_pretrained(tmp_path)
    arguments = [
        "generate",
        "--model",
        str(tmp_path),
        "--prompt",
        "zebra",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
    ]
    for explain in ([], ["--explain", "--on-the-fly", "--backend", "eager"]):
        shown = runner.invoke(cli.app, [*arguments, *explain])
        assert shown.exit_code == 0 and "<user>" not in shown.stdout and "zebra" not in shown.stdout, shown.output
        assert "zebra" in runner.invoke(cli.app, [*arguments, *explain, "--no-chat"]).stdout

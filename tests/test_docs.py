"""The documents: their commands parse and run, their figures are the rows', their links lead somewhere.

A shell command stands in a block marked `sh`, Python in one marked `python`. What ends in `# needs ...` (a Python
block: what begins so) takes more than a test has: its options are checked, and it is not run. All else is run, section
by section, in a folder that holds what the examples name.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

import skipsearch
from skipsearch.cli import app
from skipsearch.mask import SkipMask
from skipsearch.maskfile import MaskFile, ModelCard
from skipsearch.model.load import DEMO
from skipsearch.search.options import SearchOptions

ROOT = Path(__file__).parents[1]
NAMES = [
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/guide.md", "docs/how-it-works.md", "docs/limits.md",
    "docs/measurements.md",
]  # fmt: skip
NEEDS = ("minutes", "the hub", "a GPU", "a package", "a browser", "PostgreSQL", "another engine")
MARK = re.compile(r"# needs (.*)")
COMMANDS: Any = typer.main.get_command(app)
OURS = "skipsearch"
OTHERS = {"export", "pip", "source", "ruff", "mypy", "pytest", "git", "cd"}  # programs that are taken at their word
ELSEWHERE = {"doctor"}  # takes long, and tests/cli/test_terminals.py runs it
JUDGES = {"run", "validate"}  # their exit code is a verdict, which depends on the machine


class Example(NamedTuple):
    """A command line or a block of Python, and whether it takes more than a test has."""

    place: str
    language: str
    text: str
    needs: str | None


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def examples(name: str) -> list[Example]:
    """In order; the place is the document and its section."""
    found = []
    for section in re.split(r"^(?=## )", read(name), flags=re.MULTILINE):
        place = f"{name}: {section.splitlines()[0].lstrip('# ')}" if section else name
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            parts = [body] if language != "sh" else body.replace("\\\n", " ").splitlines()
            for part in filter(str.strip, parts):
                mark = MARK.search(part if language == "sh" else part.splitlines()[0])
                found.append(Example(place, language, part, mark.group(1) if mark else None))
    return found


EVERY = [example for name in NAMES for example in examples(name)]
SHELL = [example for example in EVERY if example.language == "sh"]
RUN = sorted({e.place for e in EVERY if e.needs is None and (e.language == "python" or e.text.startswith(OURS))})


def unknown(script: str, arguments: list[str]) -> list[str]:
    """The options that a script's source does not hold; those that it takes from `SearchOptions` are fields there."""
    text, fields = read(script), set(SearchOptions.__dataclass_fields__) if "SearchOptions" in read(script) else set()
    options = [a for a in arguments if a.startswith("--")]
    return [o for o in options if f'"{o}"' not in text and o[2:].replace("-", "_") not in fields]


def known_options(command: str) -> set[str]:
    options = (o for p in COMMANDS.commands[command].params for o in (*p.opts, *p.secondary_opts))
    return {o for o in options if o.startswith("-")} | {"--help"}


@pytest.mark.parametrize("example", SHELL, ids=lambda e: e.text.split("#")[0].strip()[:60])
def test_a_command_parses(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents documents from naming a command, an option, a script or a target that does not exist."""
    monkeypatch.setenv("SKIPSEARCH_STORAGE", "sqlite:///study.db")
    assert example.needs is None or example.needs.startswith(NEEDS), f"say what it needs: {NEEDS}"
    program, *arguments = shlex.split(example.text, comments=True)
    if program == OURS:
        COMMANDS.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", read("Makefile"), re.MULTILINE), arguments
    elif program == "python" or "/" in program:
        script, *arguments = [program, *arguments] if program != "python" else arguments
        assert not unknown(script, arguments), script
    else:
        assert program in OTHERS, program


@pytest.mark.parametrize("name", NAMES)
def test_options_in_the_text_exist(name: str) -> None:
    """Prevents the same in the middle of a sentence, where commands are cut short."""
    for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", read(name), flags=re.MULTILINE | re.DOTALL)):
        words = span.split()
        if words[0] == OURS and len(words) > 1:
            assert {w for w in words[2:] if re.match("--?[a-z]", w)} <= known_options(words[1]), span
        elif name == "docs/guide.md" and words[0].startswith("-"):
            assert words[0] in set().union({"--version"}, *map(known_options, COMMANDS.commands)), span
        elif words[0].startswith("benchmarks/"):
            assert not unknown(words[0], words[1:]), span
        elif words[0] == "make" and len(words) == 2:
            assert f"\n{words[1]}:" in read("Makefile"), span


def test_the_guide_names_every_option() -> None:
    """Prevents an option that only `--help` knows."""
    named = set(re.findall(r"--?[a-z][a-z-]*", read("docs/guide.md")))
    for command in COMMANDS.commands:
        missing = {
            parameter.name for parameter in COMMANDS.commands[command].params
            if parameter.param_type_name == "option" and not named & {*parameter.opts, *parameter.secondary_opts}
        }  # fmt: skip
        assert not missing - {"help"}, command
        assert f"skipsearch {command}" in read("docs/guide.md"), command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the examples name: `make demo`'s mask (here of whole layers), a model's folder, prompts, others' masks."""
    mask = SkipMask(attention=[4, 5, 9, 13], mlp=[4, 5, 9, 13], num_layers=20)
    for path in (tmp_path / "mask.json", tmp_path / "results/demo/mask.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        MaskFile.of(mask, model=ModelCard(id="demo", num_layers=20)).save(path)
    (tmp_path / "my-model").symlink_to(DEMO)
    (tmp_path / "results/measured").symlink_to(ROOT / "results/measured")
    rows = [{"question": f"def {name}(path):\n    return path"} for name in ("load", "save", "move", "copy", "find")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {name: {"attention": [3, 5], "mlp": [6]} for name in ("llama-2-13b", "another")}
    (tmp_path / "skip_layers.json").write_text(json.dumps(sets))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", RUN)
def test_a_section_runs(place: str, folder: Path) -> None:
    """Prevents examples that fail. Those of one section share a folder and their Python names."""
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notes for people
        for example in EVERY:
            if example.place != place or example.needs is not None:
                continue
            if example.language == "python":
                exec(compile(example.text, place, "exec"), names)
            elif example.language == "sh" and example.text.startswith(OURS):
                _, command, *arguments = shlex.split(example.text, comments=True)
                if command in ELSEWHERE:
                    continue
                result = CliRunner().invoke(app, [command, *arguments])
                allowed = {0, 1} if command in JUDGES else {0}
                failed = None if isinstance(result.exception, SystemExit) else result.exception
                assert failed is None and result.exit_code in allowed, f"{example.text}\n{result.output}\n{failed!r}"


def test_python_names_what_exists() -> None:
    """Prevents arguments that do not exist in blocks that are not run."""
    for example in EVERY:
        for call in ast.walk(ast.parse(example.text)) if example.language == "python" else ():
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("skipsearch."):
                target: Any = skipsearch
                for part in ast.unparse(call.func).split(".")[1:]:
                    target = getattr(target, part)
                if target is not skipsearch.search:
                    given = {keyword.arg for keyword in call.keywords if keyword.arg}
                    assert given <= set(inspect.signature(target).parameters), ast.unparse(call)


def test_the_front_page_is_short() -> None:
    """Prevents a front page that nobody reads, and lines that no terminal shows."""
    text = read("README.md")
    assert len(text.splitlines()) <= 150 and len(text.encode()) <= 8000
    for name in NAMES:
        wide = [
            line for line in read(name).splitlines()
            if len(line) > 132 and not line.startswith("|") and not re.search(r"\]\(|<img|<source", line)
        ]  # fmt: skip
        assert not wide, name


def anchors(text: str) -> set[str]:
    """Of headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", [*NAMES, "results/README.md", "search_spaces/README.md"])
def test_links_lead_somewhere(name: str) -> None:
    """Prevents dead links between files and to their headings."""
    text, here = read(name), (ROOT / name).parent
    for link in re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
        path, _, anchor = "".join(link).partition("#")
        if path.startswith(("http:", "https:")):
            continue
        place = here / path if path else ROOT / name
        assert place.exists(), link
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), link


def test_the_table_of_the_front_page_is_that_of_its_rows() -> None:
    """Prevents figures on the front page that no committed row holds."""
    lines = [line.strip("| ").split(" | ") for line in read("README.md").splitlines() if line.startswith("| ")]
    files = [json.loads(read(re.findall(r"\(([^)]+)\)", cell)[-1])) for cell in lines[0][1:]]
    assert len(files) == 3 and len(lines) == 7
    for first, *cells in lines[1:]:
        arm = re.findall(r"`([^`]+)`", first)[0]
        for cell, data in zip(cells, files, strict=True):
            row = next(row for row in data["rows"] if row["arm"] == data.get(arm, arm))
            shown = [float(number) for number in re.findall(r"\d+\.\d+", cell)]
            held = [row["speedup"], *row["speedup_ci"]] if len(shown) == 3 else [row["tokens_per_second"]]
            assert shown == pytest.approx(held, abs=0.0051 if len(shown) == 3 else 0.051), (arm, cell)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_picture_is_drawn_from_the_rows(theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a picture of older results than are committed."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    picture = importlib.import_module("picture")
    assert read(f"docs/picture-{theme}.svg") == picture.draw(theme), "run `python docs/picture.py`"

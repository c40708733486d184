"""Security: masks, spaces, results and models of strangers run no code, write nowhere else, and take no memory."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_one_sentence, make_tiny
from documents import DOCUMENT
from strangers import saved_llama
from transformers import AutoTokenizer

from skipsearch.compiled import compile as compiling
from skipsearch.errors import ModelLoadError, ResultsError, SkipsearchError
from skipsearch.files import open_folder, results_folder, write_json
from skipsearch.maskfile import parse_mask
from skipsearch.model.load import DEMO, load_model
from skipsearch.search import run
from skipsearch.search.storage import storage_url

PACKAGE = Path(__file__).parents[2] / "skipsearch"
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "subprocess", "pty", "ctypes"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "np.load", "numpy.load", "pd.read_pickle", "yaml.load",
         "yaml.unsafe_load", "yaml.full_load"}  # fmt: skip
STARTS = "search/crew.py"  # this package's own command, without a shell
RUNS = ("export/custom_generate.py", "export/nemotron_nas.py")  # the code that they have just written


# What runs


def called(node: ast.AST) -> str:
    """The dotted name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_read_is_run(path: Path) -> None:
    """Prevents a reader of files that may hold code, and shells."""
    name = path.relative_to(PACKAGE).as_posix()
    modules = MODULES - ({"subprocess"} if name == STARTS else set())
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            assert str(node.module).split(".")[0] not in modules
        elif isinstance(node, ast.Call):
            assert called(node.func) not in CALLS, called(node.func)
            assert not {k.arg for k in node.keywords} & {"shell", "allow_pickle", "weights_only"}
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not isinstance(node.value, ast.Constant) or name in RUNS


EVIL = "from pathlib import Path\nPath({0!r}).write_text('ran')\nfrom transformers import LlamaConfig as Ours\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved_llama(tmp_path / "model")


@pytest.mark.parametrize("kind", ["llama", "own"])
def test_code_of_a_model_folder_is_not_run(kind: str, folder: Path, tmp_path: Path) -> None:
    """Prevents a folder's Python from running where --trust-remote-code was not given."""
    sign = tmp_path / "ran"
    (folder / "evil.py").write_text(EVIL.format(str(sign)))
    config = json.loads((folder / "config.json").read_text())
    auto = {name: "evil.Ours" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    write_json(folder / "config.json", {**config, "model_type": kind, "auto_map": auto})
    try:
        load_model(str(folder))
    except SkipsearchError as error:
        assert kind == "own" and len(str(error).splitlines()) == 1
    assert not sign.exists()


class Bomb:
    def __init__(self, sign: str) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (self.sign,)


def test_a_pickle_in_place_of_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    """Prevents weights in the old format from running what they hold."""
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(str(tmp_path / "ran"))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError) as error:
        load_model(str(folder))
    assert_one_sentence(error)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def found() -> Path:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        return compiling.keep_compiled()

    return found


def test_compiled_code_lies_where_only_the_user_writes(
    cache: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prevents code that another user of the machine has put there from being run."""
    folder = cache()
    parts = [folder, folder.parent, folder.parent.parent]
    assert parts[-1] == tmp_path / "cache" / "skipsearch"
    assert [part.stat().st_mode & 0o777 for part in parts] == [0o700] * 3
    parts[1].chmod(0o777)  # as an older version left it
    assert cache() == folder and parts[1].stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(compiling.os, "getuid", lambda: os.geteuid() + 1)  # the folder is another user's
    other = cache()
    assert other != folder and other.parent == tmp_path and other.stat().st_mode & 0o777 == 0o700


# Where files are written


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "..", ".", "", "a/../../x", "..\\..\\x", "a\0b", "\n", "...", "~"]
)
def test_a_name_stays_in_results(name: str) -> None:
    """Prevents a model's name from leading the results elsewhere."""
    folder = results_folder(name)
    assert folder.parent == Path("results") and folder.name not in ("", ".", "..") and folder.name.isprintable()


def test_a_model_with_a_path_for_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prevents results in the model's own folder, or wherever a config's name leads."""
    monkeypatch.chdir(tmp_path)
    model, folders = make_tiny("llama"), list[Path]()
    monkeypatch.setattr(run, "open_folder", lambda folder: folders.append(folder))
    for name in ("../../x", str(tmp_path), "some/model", "."):
        model.config._name_or_path = name
        with pytest.raises(SkipsearchError):
            run.search(model, AutoTokenizer.from_pretrained(DEMO), ["one"])
    assert folders[1:3] == [Path("results") / tmp_path.name, Path("results/some--model")]
    assert all(folder.parent == Path("results") for folder in folders)


def test_a_link_leads_no_write_elsewhere(tmp_path: Path) -> None:
    """Prevents a results folder of a stranger from overwriting a file outside of it."""
    folder, other = tmp_path / "results", tmp_path / "precious"
    folder.mkdir()
    other.write_text("mine")
    for name in (".write-probe", "trace.json", "mask.json", "study.db"):
        (folder / name).symlink_to(other)
    open_folder(folder)
    write_json(folder / "trace.json", {})
    parse_mask(DOCUMENT).save(folder / "mask.json")
    with pytest.raises(ResultsError) as error:
        storage_url(folder)
    assert_one_sentence(error, "is a link to", "--storage")
    assert other.read_text() == "mine" and not (folder / "mask.json").is_symlink()

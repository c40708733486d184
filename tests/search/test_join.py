"""Workers that join a study: what a run leaves for them suffices, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from conftest import assert_one_sentence, make_tiny
from transformers import AutoTokenizer
from typer.testing import CliRunner

from skipsearch import cli, search
from skipsearch.errors import ResultsError, SkipsearchError, StudyMismatch, StudyWarning
from skipsearch.model.load import DEMO, Loaded, load_model
from skipsearch.report import dashboard
from skipsearch.search import patience
from skipsearch.search.attributes import LARGE, backend, set_once
from skipsearch.search.crew import crew
from skipsearch.search.integrity import kept
from skipsearch.search.job import Job
from skipsearch.search.join import join, read_offer
from skipsearch.search.options import SearchOptions
from skipsearch.search.storage import open_storage, storage_url, stored

SMALL = SearchOptions(
    trials=8, prompts=3, held_out=2, prompt_tokens=16, new_tokens=16, trial_tokens=12, rounds=1, backend="eager",
)  # fmt: skip
runner = CliRunner()


@contextmanager
def changed(folder: Path, statement: str) -> Iterator[str]:
    """The study's URL while a statement has changed a copy of it."""
    copy = folder / "changed.db"
    copy.write_bytes((folder / "study.db").read_bytes())
    engine = sqlalchemy.create_engine(f"sqlite:///{copy}")
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text(statement))
    engine.dispose()
    yield f"sqlite:///{copy}"
    copy.unlink()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A random model of four layers in a folder."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = make_tiny("llama", vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=64)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return load_model(str(place))


@pytest.fixture(scope="module")
def folder(small: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run."""
    folder = tmp_path_factory.mktemp("joined")
    search(small, out=folder, options=SMALL)
    engine = open_storage(storage_url(folder)).engine
    with engine.begin() as connection:  # no reader may see a part of the journal that lies beside the file
        connection.execute(sqlalchemy.text("PRAGMA wal_checkpoint(TRUNCATE)"))
    engine.dispose()
    return folder


def test_a_worker_scores_as_the_run_does(folder: Path, small: Loaded) -> None:
    """Prevents a worker whose scores differ from those of the run, and one that records or profiles again."""
    stages: list[str] = []
    with changed(folder, "UPDATE trials SET state = 'FAIL' WHERE number >= 4") as url:
        before = {t["trial"]: t for t in trials_of(folder / "study.db")}
        done = join(small, read_offer(url, "search"), progress=lambda stage, *_: stages.append(stage))
        after = trials_of(Path(url.removeprefix("sqlite:///")))
    assert done.trials == 8 and done.own == 4 and done.wanted == 8 and not done.waited
    assert set(stages) == {"reference", "trials"}
    known = {t["params"]: t["tokens_per_second"] for t in before.values()}
    again = [t for t in after if t["params"] in known]
    assert len(again) == 8, "the plans of failed trials are tried again"
    assert all(t["tokens_per_second"] == pytest.approx(known[t["params"]], rel=1e-3) for t in again)


def trials_of(path: Path) -> list[dict[str, Any]]:
    import optuna

    storage = open_storage(f"sqlite:///{path}")
    study = optuna.load_study(study_name="search", storage=storage)
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    storage.engine.dispose()
    return [{"trial": t.number, "params": tuple(sorted(t.params.items())), **t.user_attrs} for t in trials]


def test_a_job_is_read_as_it_was_written(folder: Path) -> None:
    """Prevents a worker with another trace, space or set of seeds than the run's."""
    data = stored(storage_url(folder), "search", ("job",))["job"]
    job = Job.read(data, "search")
    assert json.loads(json.dumps(job.to_dict())) == stored(storage_url(folder), "search", ("job",))["job"]
    assert job.trace.continuations and job.space.free and job.seeds[0][1] == "empty"


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("DELETE FROM study_user_attributes WHERE key = 'job'", "no job for workers"),
        ("DELETE FROM study_user_attributes WHERE key = 'share'", "no share for workers"),
        ("UPDATE study_system_attributes SET value_json = '\"x\"' WHERE key LIKE 'skipsearch:job%'", "another job"),
        ("DELETE FROM study_system_attributes WHERE key LIKE 'skipsearch:job%'", "another job"),
        ("UPDATE studies SET study_name = 'first'", "which has first"),
    ],
)
def test_a_study_without_what_a_worker_needs(statement: str, words: str, folder: Path) -> None:
    """Prevents a traceback, or hours of trials, on a study of an older version or a damaged one."""
    with changed(folder, statement) as url, pytest.raises((StudyMismatch, ResultsError)) as error:
        read_offer(url, "search")
    assert_one_sentence(error, words)


def test_another_version_or_model_is_refused(folder: Path, small: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents scores of other code or of another model in one study."""
    offer = read_offer(storage_url(folder), "search")
    tiny = replace(small, name="tiny", model=make_tiny("llama", num_hidden_layers=3))
    with pytest.raises(StudyMismatch) as error:
        join(tiny, offer)
    assert_one_sentence(error, "another model than tiny")
    with pytest.raises(StudyMismatch) as error:
        join(small, replace(offer, identity={**offer.identity, "weights": "0"}))
    assert_one_sentence(error, "other weights or another dtype", "float32")
    monkeypatch.setattr("skipsearch.search.job.version", lambda _name: "9.9")
    with pytest.raises(StudyMismatch) as error:
        read_offer(storage_url(folder), "search")
    assert_one_sentence(error, "this is 9.9")


def test_the_command_joins_and_makes_no_file(folder: Path, small: Loaded, tmp_path: Path) -> None:
    """Prevents a worker that needs the run's folder, or that leaves an empty database where there is none."""
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["worker", "--model", model_of(small), "--json", "--storage"]
    try:
        result = runner.invoke(cli.app, [*arguments, storage_url(folder)])
        assert result.exit_code == 0 and json.loads(result.stdout)["trials"] == 8
        missing = runner.invoke(cli.app, [*arguments, f"sqlite:///{tmp_path}/none.db"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert isinstance(missing.exception, ResultsError) and not list(tmp_path.iterdir())


def test_a_run_with_workers_leaves_no_process(small: Loaded, tmp_path: Path) -> None:
    """Prevents workers that outlive their run, and a run that waits for those still loading."""
    result = search(small, out=tmp_path, options=replace(SMALL, workers=2))
    log = tmp_path / "worker-1.log"
    assert result.trials == 8 and log.exists()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if f"--model\0{model_of(small)}" in read(p)]


def test_workers_that_cannot_load_the_model_are_told_first(small: Loaded, tmp_path: Path) -> None:
    """Prevents minutes of recording and profiling before the refusal."""
    with pytest.raises(SkipsearchError) as error:
        search(replace(small, given=None), out=tmp_path / "x", options=replace(SMALL, workers=2))
    assert_one_sentence(error, "passed as an object")
    assert not (tmp_path / "x").exists()


def test_a_study_without_a_job_goes_on(folder: Path, small: Loaded, tmp_path: Path) -> None:
    """Prevents finished trials of the version before from being refused as damaged."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    engine = sqlalchemy.create_engine(storage_url(copy))
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DELETE FROM study_user_attributes WHERE key IN ('job', 'trials')"))
        connection.execute(sqlalchemy.text("DELETE FROM study_system_attributes WHERE key LIKE 'skipsearch:job%'"))
    engine.dispose()
    assert search(small, out=copy, options=replace(SMALL, trials=9)).trials == 9
    assert read_offer(storage_url(copy), "search").trials == 9


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:/u:SECRET@h/db", "postgresql://u:SECRET@h:abc/db", "postgresql://u:SECRET@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?password=SECRET&user=u", "nonsense://u:SECRET@h/db",
    ],
)  # fmt: skip
def test_no_password_is_shown(url: str) -> None:
    """Prevents passwords in logs, and tracebacks of wrong URLs."""
    for serve in (lambda: read_offer(url, "search"), lambda: dashboard.serve(None, url, "127.0.0.1", 0, print)):
        with pytest.raises(ResultsError) as error:
            serve()
        assert_one_sentence(error, "cannot be opened", "check --storage")
        assert "SECRET" not in str(error.value)


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pysqlite"])
def test_looking_makes_no_tables(scheme: str, tmp_path: Path) -> None:
    """Prevents a worker or a dashboard from making a database where there is none, or tables in another program's."""
    path = tmp_path / "x.db"
    for exists in (False, True):
        if exists:
            path.touch()
        for look in (lambda u: read_offer(u, "search"), lambda u: dashboard.serve(None, u, "127.0.0.1", 0, print)):
            with pytest.raises(ResultsError) as error:
                look(f"{scheme}:///{path}")
            assert_one_sentence(error)
        assert path.exists() == exists and (not exists or not path.stat().st_size)


def model_of(loaded: Loaded) -> str:
    assert loaded.given is not None
    return str(loaded.given["model"])


def read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def test_a_worker_that_fails_is_told(small: Loaded, tmp_path: Path) -> None:
    """Prevents a run that goes on alone without saying why its worker ended."""
    lost = replace(small, given={"model": "no/such/model"})
    with (
        pytest.warns(StudyWarning, match=r"worker 1 ended early .*error: .*worker-1\.log"),
        crew(2, lost, "sqlite:////none.db", "search", tmp_path) as workers,
    ):
        assert workers[0].wait(300) == 1


def test_a_server_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents: a restart ends all workers; a fault that will not pass is repeated; a write counts twice."""
    waits, lost = patience.Patience("db", active=True), sqlalchemy.exc.OperationalError("s", {}, Exception("gone"))
    answers: list[Any] = [lost, lost, 7]

    def answer() -> Any:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    with pytest.warns(StudyWarning, match="db does not answer"):
        assert waits(answer) == 7
    assert waits.seconds > 0.2
    answers[:] = [lost, sqlalchemy.exc.IntegrityError("s", {}, Exception("twice"))]
    with pytest.warns(StudyWarning):
        assert waits(answer) is None, "what the server had done before it was lost"
    for error in (ValueError("no"), sqlalchemy.exc.IntegrityError("s", {}, Exception("twice"))):
        answers[:] = [error]
        with pytest.raises(type(error)):
            waits(answer)
    answers[:] = [lost]
    with pytest.raises(sqlalchemy.exc.OperationalError):
        patience.Patience("file", active=False)(answer)
    monkeypatch.setattr(patience, "PATIENCE", 0.0)
    answers[:] = [lost] * 3
    with pytest.raises(sqlalchemy.exc.OperationalError), pytest.warns(StudyWarning):
        waits(answer)


def test_large_values_are_stored_in_parts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents rows that MySQL cuts off, and a dashboard that shows a hundred thousand token ids."""
    import optuna

    monkeypatch.setattr("skipsearch.search.attributes.PART", 100)
    study = optuna.create_study(storage=open_storage(f"sqlite:///{tmp_path}/x.db"))
    value = {"ids": list(range(LARGE)), "text": "é" * 9}
    set_once(study, "large", value)
    set_once(study, "large", {"other": 1})
    rows = study._storage.get_study_system_attrs(study._study_id)
    assert len(rows) > 10 and all(len(row) <= 100 for row in rows.values())
    assert kept(study, "large") == value and len(json.dumps(study.user_attrs["large"])) < 200
    backend(study).engine.dispose()

"""Damaged studies: what was changed where SQLite sees nothing is refused."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_sentence
from small_run import opened, small_run

from skipsearch.errors import ResultsError


@pytest.fixture
def kept(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return small_run(tmp_path_factory.getbasetemp() / "small-run")


CHANGES = (
    "UPDATE trial_values SET value = value * 2 WHERE trial_id = 2",
    "UPDATE trial_params SET param_value = 1 - param_value WHERE trial_id = 2",
    "UPDATE trial_params SET param_value = 77 WHERE trial_id = 2",
    "UPDATE trial_params SET param_name = 'mlp.77' WHERE trial_id = 2 AND param_name = 'mlp.00'",
    "UPDATE trial_user_attributes SET value_json = '9999.5' WHERE trial_id = 2 AND key = 'tokens_per_second'",
    "UPDATE trial_user_attributes SET key = 'tau2' WHERE trial_id = 2 AND key = 'tau'",
    "UPDATE trial_user_attributes SET value_json = '{' WHERE trial_id = 2 AND key = 'tau'",
    "DELETE FROM trial_user_attributes WHERE trial_id = 2 AND key = 'check'",
    "DELETE FROM trial_values WHERE trial_id = 2",
    "UPDATE trials SET study_id = 7 WHERE trial_id = 2",
    "UPDATE trials SET number = 9 WHERE trial_id = 2",
    "UPDATE trials SET state = 'COMPLETF' WHERE trial_id = 2",
    "UPDATE trials SET datetime_start = 'yesterday' WHERE trial_id = 2",
    "UPDATE study_user_attributes SET value_json = replace(value_json, '0', '1') WHERE key = 'costs'",
    "UPDATE study_user_attributes SET value_json = replace(value_json, '0', '1') WHERE key = 'space'",
    "UPDATE study_user_attributes SET value_json = replace(value_json, '0', '1') WHERE key = 'identity'",
    "UPDATE study_user_attributes SET value_json = replace(value_json, 'value', 'valve') WHERE key = 'identity'",
    "UPDATE study_user_attributes SET value_json = replace(value_json, 'sha256', 'sha356') WHERE key = 'costs'",
    "UPDATE study_user_attributes SET value_json = '1.0' WHERE key = 'share'",
    *(f"UPDATE study_user_attributes SET key = 'x' WHERE key = '{k}'" for k in ("identity", "space", "costs", "share")),
    "UPDATE study_user_attributes SET key = 'x' WHERE key = 'job'",
    "UPDATE study_user_attributes SET value_json = replace(value_json, '\"parts\"', '\"value\"') WHERE key = 'job'",
    'UPDATE study_user_attributes SET value_json = \'{"parts": 1e9, "sha256": "0"}\' WHERE key = \'job\'',
    "DELETE FROM study_system_attributes WHERE key = 'skipsearch:job:0'",
    "UPDATE study_system_attributes SET value_json = '\"eJw=\"' WHERE key = 'skipsearch:job:0'",
    "UPDATE study_directions SET direction = 'UPWARDS'",
    "UPDATE alembic_version SET version_num = 'v9'",
)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_study_is_refused(change: str, kept: Any, tmp_path: Path) -> None:
    """Prevents a value that was changed where SQLite sees nothing from becoming the best trial."""
    path = Path(shutil.copy(kept.folder / "study.db", tmp_path / "study.db"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute(change).rowcount > 0
        connection.commit()
    with pytest.raises(ResultsError) as error:
        opened(kept, path)
    assert_one_sentence(error, "--out")


def test_a_study_of_an_earlier_version_goes_on(kept: Any, tmp_path: Path) -> None:
    """Prevents an update from throwing finished trials away."""
    path = Path(shutil.copy(kept.folder / "study.db", tmp_path / "study.db"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM trial_user_attributes WHERE key = 'check'")
        connection.execute("DELETE FROM study_user_attributes WHERE key IN ('job', 'trials')")
        for key, text in connection.execute("SELECT key, value_json FROM study_user_attributes").fetchall():
            value = json.loads(text).get("value")
            if value is None:
                query = "SELECT value_json FROM study_system_attributes WHERE key LIKE ? ORDER BY key"
                parts = [json.loads(part) for (part,) in connection.execute(query, (f"skipsearch:{key}:%",))]
                value = json.loads(zlib.decompress(base64.b64decode("".join(parts))))
            sets = "UPDATE study_user_attributes SET value_json = ? WHERE key = ?"
            connection.execute(sets, (json.dumps(value), key))
        connection.execute("DELETE FROM study_system_attributes")
        connection.commit()
    before, after = opened(kept, kept.folder / "study.db"), opened(kept, path)
    assert all("job" in shared for *_, shared, _ in (before, after)) and after[3].pop("job") is None
    before[3].pop("job")
    assert after == before

"""A coordinator's folder and its backup for each test: a pytest plugin, used with backed_up.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from backed_up import RUN
from enrolment import approved

from meadow.journal import Journal
from meadow.server.authority import Authority
from meadow.server.coordinator_backup import backup
from meadow.server.roster import Roster


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A coordinator's folder after a round, with nobody working in it."""
    folder = tmp_path / "home"
    Authority.open(folder / "authority").issue_server(["localhost"])
    with Roster.open(folder / "roster.db") as roster:
        approved(roster, "a")
    with Journal.open(folder / "run", RUN) as journal:
        journal.close_round(0, b"state 0", {})
        journal.open_round(1, ["a"])
        journal.receive(1, "a", b"payload")
        journal.close_round(1, b"state 1", {"loss": 1.0})
    (folder / "run" / "metrics.jsonl").write_text("{}\n")
    (folder / "logs" / "empty").mkdir(parents=True)
    return folder


@pytest.fixture
def file(home: Path, tmp_path: Path) -> Path:
    path = tmp_path / "backup.tar"
    backup(home, path)
    return path

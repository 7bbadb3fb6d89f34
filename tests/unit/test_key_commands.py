"""The commands for keys and audit where the log, the disk or the owner of a folder is not as one would wish."""

import os
from pathlib import Path
from typing import Any

import pytest

from service import __main__ as command
from service.errors import AuditUnwritable
from service.keys import add_key, read_keys


class FullLog:
    """Stands for an audit log on a full disk."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def write(self, event: str, **facts: Any) -> None:
        raise AuditUnwritable("the audit log cannot be written: no space left on device")

    def close(self) -> None:
        pass


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def test_thief_is_locked_out_whatever_the_log_says(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A key is revoked also when that cannot be recorded; the command says both."""
    add_key(state / "keys.json", "alice")
    monkeypatch.setattr(command, "AuditLog", FullLog)
    assert command.main(["keys", "revoke", "alice"]) == 1
    said = capsys.readouterr().err
    assert "alice is revoked" in said
    assert "no space" in said
    assert read_keys(state / "keys.json") == ()


@pytest.mark.parametrize("failure", [AuditUnwritable("no space"), KeyboardInterrupt()])
def test_there_is_no_key_that_the_log_does_not_know(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failure: BaseException
) -> None:
    """A key whose line cannot be written, or whose command is interrupted, is taken back and never shown."""

    def fail(self: FullLog, event: str, **facts: Any) -> None:
        raise failure

    monkeypatch.setattr(FullLog, "write", fail)
    monkeypatch.setattr(command, "AuditLog", FullLog)
    assert command.main(["keys", "add", "alice"]) in (1, 130)
    assert "mllm_" not in capsys.readouterr().out
    assert read_keys(state / "keys.json") == ()


def test_log_is_verified_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Evidence is read without a state folder, and none is made."""
    monkeypatch.setenv("LLM_STATE_DIR", str(tmp_path / "none"))
    assert command.main(["audit", "verify", str(tmp_path / "evidence")]) == 1
    assert "neither a file nor a folder" in capsys.readouterr().out
    assert command.main(["keys", "list"]) == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="did not run: only root can give files away")
def test_what_root_makes_belongs_to_the_service(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that root adds before the service's first start are the service's user's to read, and so is the log."""
    os.chown(state, 65534, 65534)
    assert command.main(["keys", "add", "alice"]) == 0
    made = [state / "keys.json", state / "keys.json.lock", state / "audit", *(state / "audit").iterdir()]
    assert len(made) >= 4
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(65534, 65534)}

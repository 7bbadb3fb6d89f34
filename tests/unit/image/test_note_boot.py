"""What is noted once a boot: where its timeline begins, and how old the image is."""

import json
from pathlib import Path

import pytest

from service.boot import Timeline, now_s
from tests.image.scripts import load_script

note_boot = load_script("rootfs/usr/lib/mini-llm/note_boot.py")
FIRST = "1 (systemd (1) x) S 0 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 250 1 1"


def test_a_boot_begins_with_the_kernel_unless_that_is_another_host_s() -> None:
    """A container's begins with its first process, 2.5 s after its host here."""
    assert note_boot.boot_times_s(FIRST, in_container=False) == {"begin": 0.0, "userspace": 2.5}
    assert note_boot.boot_times_s(FIRST, in_container=True) == {"begin": 2.5, "userspace": 2.5}


def test_the_image_s_age_and_its_audit_are_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit that did not run is no audit without findings."""
    image = {"version": "1", "baked": "2026-11-26T00:00:00+00:00", "model": {"name": "starter"}}
    (tmp_path / "image.json").write_text(json.dumps(image))
    (tmp_path / "metrics").mkdir()
    monkeypatch.setattr(note_boot, "IMAGE", tmp_path / "image.json")
    written = tmp_path / "metrics" / "image.prom"
    assert note_boot.main(tmp_path, tmp_path) == 0
    assert "mini_llm_image_baked_timestamp_seconds 1795651200\n" in written.read_text()
    assert "findings" not in written.read_text()
    (tmp_path / "image_audit.json").write_text('{"findings": ["x"]}')
    note_boot.main(tmp_path, tmp_path)
    assert "mini_llm_image_audit_findings 1\n" in written.read_text()


def test_the_service_tells_the_timeline(tmp_path: Path) -> None:
    """What has not happened is null; only the first time of anything counts."""
    timeline = Timeline(tmp_path)
    assert set(timeline.tell().values()) == {None}
    (tmp_path / "begin").write_text(f"{now_s() - 10}\n")
    (tmp_path / "facts").write_text(f"{now_s() - 9}\n")
    timeline.note("model")
    told = timeline.tell()
    timeline.note("model")
    assert timeline.tell() == told
    assert told["facts_s"] == pytest.approx(1, abs=0.1)
    assert told["model_s"] == pytest.approx(10, abs=0.5)
    assert (told["first_token_s"], told["certificate_s"]) == (None, None)

"""Owns what is known once a boot: where its timeline begins, and how old the image is, for Prometheus.

``python3 note_boot.py TIMELINE NODE`` writes into the folder TIMELINE ``begin`` and ``userspace`` (seconds of the
host's clock since its start), and into NODE ``metrics/image.prom``, from the image's description and its audit's
result.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

IMAGE = Path("/usr/share/mini-llm/image.json")
# systemd's word for a container: it shares its host's kernel, whose start is not this boot's.
CONTAINER = Path("/run/systemd/container")
FIRST = Path("/proc/1/stat")


def boot_times_s(first: str, in_container: bool) -> dict[str, float]:
    """When this boot and its first process began, from that process's line in /proc (man 5 proc, field 22)."""
    userspace_s = int(first.rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return {"begin": userspace_s if in_container else 0.0, "userspace": userspace_s}


def render_metrics(image: dict[str, Any], findings: list[str] | None) -> str:
    """The text exposition; findings are None where there was no audit, which is told by an absent metric."""
    baked_s = datetime.fromisoformat(image["baked"]).timestamp()
    lines = [
        "# HELP mini_llm_image_baked_timestamp_seconds When the image of this node was baked.",
        "# TYPE mini_llm_image_baked_timestamp_seconds gauge",
        f"mini_llm_image_baked_timestamp_seconds {baked_s:.0f}",
        "# HELP mini_llm_image_info The image of this node.",
        "# TYPE mini_llm_image_info gauge",
        f'mini_llm_image_info{{version="{image["version"]}",model="{image["model"]["name"]}"}} 1',
    ]
    if findings is not None:
        lines += [
            "# HELP mini_llm_image_audit_findings What the audit at the first boot found that must be in no image.",
            "# TYPE mini_llm_image_audit_findings gauge",
            f"mini_llm_image_audit_findings {len(findings)}",
        ]
    return "".join(f"{line}\n" for line in lines)


def main(timeline: Path, node: Path) -> int:
    """Reads and writes; a missing audit is no failure, a missing image is."""
    for name, at_s in boot_times_s(FIRST.read_text(), CONTAINER.exists()).items():
        (timeline / name).write_text(f"{at_s}\n")
    try:
        findings = json.loads((node / "image_audit.json").read_text())["findings"]
    except FileNotFoundError:
        findings = None
    metrics = node / "metrics" / "image.prom"
    unfinished = metrics.with_suffix(".unfinished")
    unfinished.write_text(render_metrics(json.loads(IMAGE.read_text()), findings))
    unfinished.chmod(0o644)
    unfinished.replace(metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

"""The demo, whole, as ``make demo`` runs it: what a newcomer sees first."""

import re
import signal
import subprocess
import sys

from tests.absent import did_not_run
from tests.demo import CannotRun, check_machine
from tests.image.harness import ROOT
from tests.programs import list_kept

_STEPS = [
    "What this machine has",
    "A Hetzner Cloud of this machine's own",
    "Bake the image",
    "Launch a node by",
    "A generation over HTTPS",
    "Bake a second version",
    "Roll it out while clients stream",
    "Has anything drifted?",
    "Tear it down",
]


def test_the_demo(host: None, programs: None) -> None:
    """Each step, no failed request, nothing left; by the API where Terraform's provider cannot be had."""
    try:
        check_machine()
    except CannotRun as error:
        did_not_run(error)
    kept_before = list_kept("layers-*")
    command = [sys.executable, "-m", "tests.demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            said, trouble = process.communicate(timeout=900)
        except BaseException:
            process.send_signal(signal.SIGINT)  # it removes what it made
            process.communicate(timeout=120)
            raise
    assert process.returncode == 0, said[-5000:] + trouble
    table = [line for line in said.partition("What was seen:\n")[2].splitlines() if re.search(r"\d s  ", line)]
    assert [step for step, line in zip(_STEPS, table, strict=True) if not line.startswith(step)] == []
    # Either an earlier demo's layers were taken, or this one's are kept for the next.
    taken = "are those of an earlier demo" in said
    assert table[2].endswith("; baked: service" if taken else "; baked: model, base, stack, service")
    assert taken or set(list_kept("layers-*")) - set(kept_before)
    assert re.search(r"  [1-9]\d* requests, 0 failed, 0 certificates ordered; ", table[6])
    assert table[8].endswith("left behind: nothing")

"""A fixed sample of the fault plan of an apply, by the command that runs all of it.

What passes does no harm; what does not leaves the old node serving, and the next apply heals it.
"""

import re
from pathlib import Path

from tests.absent import did_not_run
from tests.image.launch import find_program
from tests.typed import type_command

SAMPLE = (
    "passing: 409 conflict, POST /v1/floating_ips/*/actions/assign",
    "passing: 429 rate_limit_exceeded, GET /v1/servers/*",
    "fatal: 403 forbidden, POST /v1/servers",
    "fatal: 403 forbidden, POST /v1/floating_ips/*/actions/assign",
    "fatal: lost_answer, POST /v1/servers",
    "fatal: 403 forbidden, POST /v1/servers/*/actions/attach_to_network",
    "fatal: action_failed create_server",
    "killed: moment 2 of 10",
    "killed: moment 7 of 10",
)


def test_a_sample_of_the_plan(packer: None, tmp_path: Path) -> None:
    """Each case is told good, and nothing is left."""
    program, why = find_program(tmp_path)
    if program is None:
        did_not_run(why, may_in_ci=True)
    names = "|".join(re.escape(name) for name in SAMPLE)
    said = type_command(f"make test-launch-faults FAULTS=\"--only '^({names})\\Z'\"", 800)
    print(said)
    for name in SAMPLE:
        assert f"\n{name}: good " in said
    assert f"\n{len(SAMPLE)} cases, 0 failed; " in said

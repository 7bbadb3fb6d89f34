"""A fixed sample of the fault plan; ``make test-faults`` runs all of it."""

import re

import pytest

from tests.bake.fault_plan import Clean, list_cases, run_case
from tests.bake.harness import Bench
from tests.typed import type_command

SAMPLE = (
    "passing: lost_answer, call 1",
    "passing: 412 resource_unavailable, call 1",
    "passing: action_failed create_image, call 2",
    "fatal: always POST /v1/servers",
    "fatal: always POST /v1/servers/*/actions/create_image",
    "fatal: always PUT /v1/images/*",
    "killed: random 1",
    "interrupted: 1",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_case_of_the_plan(bench: Bench, clean: Clean, name: str) -> None:
    """It ends as it should, and nothing is left."""
    # Moments are told behind the name: they depend on how long a bake takes here.
    wanted = re.compile(rf"{re.escape(name)}(: at .*|: SIG.*)?")
    found = [case for case in list_cases(clean) if wanted.fullmatch(f"{case.group}: {case.name}")]
    assert len(found) == 1, found
    outcome = run_case(found[0], bench)
    print(f"{found[0].name}: {outcome.took_s:.1f} s, {outcome.left} left")
    assert not outcome.wrong, "\n".join(outcome.wrong)


def test_the_command(host: None) -> None:
    """As it is typed, with an option that leaves one case."""
    said = type_command("make test-faults FAULTS=\"--jobs 1 --only '503 unavailable, call 1\\Z'\"", 300)
    assert "1/1 ok passing: 503 unavailable, call 1 " in said
    assert "1 cases, 0 failed, 0 resources left" in said

"""A fixed sample of the fault plan of an apply; ``make test-launch-faults`` runs all of it."""

import shutil
from collections.abc import Iterator

import pytest

from tests.absent import did_not_run
from tests.bake.harness import Bench
from tests.bake.launch_fault_plan import Clean, Stage, list_cases, record, running_stage
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


@pytest.fixture(scope="module")
def stage(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A stand-in node that Terraform has launched."""
    program = shutil.which("terraform") or shutil.which("tofu")
    if program is None:
        did_not_run("neither terraform nor tofu is installed", may_in_ci=True)
    bench.clear()
    with running_stage(bench, tmp_path_factory.mktemp("stage"), program) as made:
        yield made
    bench.clear()


@pytest.fixture(scope="module")
def quiet(stage: Stage) -> Clean:
    """What a rollout does that nothing befalls."""
    return record(stage)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_case_of_the_plan(stage: Stage, quiet: Clean, name: str) -> None:
    """What passes does no harm; what does not leaves the old node serving, and the next apply heals it."""
    found = [case for case in list_cases(quiet) if f"{case.group}: {case.name}" == name]
    assert len(found) == 1, [f"{case.group}: {case.name}" for case in list_cases(quiet)]
    wrong = found[0].run(stage)
    assert not wrong, "\n".join(wrong)


def test_the_command(stage: Stage) -> None:
    """As it is typed, with an option that leaves one case; another stage is there, so that this can be."""
    said = type_command("make test-launch-faults FAULTS=\"--only '502 bad_gateway, POST /v1/servers\\Z'\"", 300)
    assert "passing: 502 bad_gateway, POST /v1/servers: good " in said
    assert "1 cases, 0 failed; " in said

"""A fixed sample of the fault plan, by the command that runs all of it: each ends as it should, and nothing is left."""

import re

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


def test_a_sample_of_the_plan(packer: None) -> None:
    """Moments are told behind a case's name: they depend on how long a bake takes here."""
    names = "|".join(re.escape(name) for name in SAMPLE)
    said = type_command(f"make test-faults FAULTS=\"--jobs 1 --only '^({names})(: at .*|: SIG.*)?\\Z'\"", 800)
    print(said)
    for name in SAMPLE:
        assert len(re.findall(rf"^\d+/{len(SAMPLE)} ok {re.escape(name)}[ :]", said, re.MULTILINE)) == 1, said
    assert f"\n{len(SAMPLE)} cases, 0 failed, 0 resources left" in said

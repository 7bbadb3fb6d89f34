"""Which labels are allowed, and what selectors choose."""

import pytest

from scripts.local_cloud.api.labels import SelectorInvalid, find_problems, parse_selector

LABELS = {"role": "web", "env": "prod", "example.com/team": "blue", "empty": ""}


@pytest.mark.parametrize(
    "labels",
    [
        {"a": ""},
        {"a": "b"},
        {"a-b_c.d": "1.2-3_4"},
        {"k" * 63: "v" * 63},
        {"example.com/k": "v"},
        {"hetzner.cloudy/k": "v"},
        {f"{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 61}/k": "v"},
    ],
)
def test_labels_that_keep_the_rules_have_no_problems(labels: dict[str, str]) -> None:
    assert find_problems(labels) == []


@pytest.mark.parametrize(
    "labels",
    [
        {"": "v"},
        {"k" * 64: "v"},
        {"a": "v" * 64},
        {"-a": "v"},
        {"a-": "v"},
        {"a": "-v"},
        {"a": "v."},
        {"a": "with space"},
        {"a": "line\n"},
        {"a\n": "v"},
        {"hetzner.cloud/k": "v"},
        {"/k": "v"},
        {"example.com/": "v"},
        {"Example.com/k": "v"},
        {"a/b/c": "v"},
        {f"{'a' * 254}/k": "v"},
        {"ä": "v"},
        {"a": 1},
        {"a": None},
    ],
)
def test_labels_that_break_a_rule_are_told(labels: dict[str, object]) -> None:
    assert len(find_problems(labels)) == 1


@pytest.mark.parametrize(
    ("selector", "chosen"),
    [
        ("", True),
        ("role", True),
        ("missing", False),
        ("!missing", True),
        ("! role", False),
        ("role=web", True),
        ("role==web", True),
        (" role == web ", True),
        ("role=db", False),
        ("role!=db", True),
        ("role!=web", False),
        ("missing!=x", True),
        ("empty=", True),
        ("role=", False),
        ("role in (web,db)", True),
        ("role in ( db , cache )", False),
        ("role notin (db)", True),
        ("role notin (web)", False),
        ("missing notin (x)", True),
        ("role in (web,db),env=prod", True),
        ("role in (web,db),env=test", False),
        ("example.com/team=blue,!missing,env", True),
    ],
)
def test_selectors_choose(selector: str, chosen: bool) -> None:
    assert parse_selector(selector)(LABELS) is chosen


@pytest.mark.parametrize("selector", ["=", "a=b=c", "a in", "a in b", "in (a)x", ",", "a,,b", "a in (b", "!a=b", "a b"])
def test_selectors_that_cannot_be_read_are_refused(selector: str) -> None:
    with pytest.raises(SelectorInvalid):
        parse_selector(selector)

"""What a node makes of the facts in its user-data: files for the service, or one clear line for each mistake."""

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from scripts.handover_key import make_pair
from service.keys import read_keys
from tests.image.scripts import ROOT, load_script

facts = load_script("rootfs/usr/lib/mini-llm/facts.py")
SCHEMA = ROOT / "cloud-init" / "facts.schema.json"
PROMETHEUS = ROOT / "image/rootfs/usr/share/mini-llm/stack/prometheus/prometheus.yaml"
HASH = "0123456789abcdef" * 4
KEY = f"{{name: a, sha256: {HASH}"
PLACE = "domain: llm.example.org\nacme: {email: a@example.org}\n"
HASHED = "$apr1$f8Vn0cXw$ydb6HbE6kHTv.sEmvvcK/1"
MAIL = "to: a@b.org, from: a@b.org, smarthost: 'b.org:25'"
RIGHT = f"{PLACE}api_keys: [{KEY}}}]\n"
# Of nobody's: signs itself, for llm.example.org and *.llm.example.org (its CN is other.example.org), and ended in 2020.
CHAIN = """\
-----BEGIN CERTIFICATE-----
MIIBVzCB/qADAgECAgEBMAoGCCqGSM49BAMCMBwxGjAYBgNVBAMMEW90aGVyLmV4
YW1wbGUub3JnMB4XDTIwMDEwMTAwMDAwMFoXDTIwMDIwMTAwMDAwMFowHDEaMBgG
A1UEAwwRb3RoZXIuZXhhbXBsZS5vcmcwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNC
AASJb8pdCB4j1Q1CqDosIG0zGI9t7Teaki1+Z1Fpw5AsQEmIfjOwLqq2KpY28XPW
kDK0NT1eyMxOkjM7VMEsuU77ozEwLzAtBgNVHREEJjAkgg9sbG0uZXhhbXBsZS5v
cmeCESoubGxtLmV4YW1wbGUub3JnMAoGCCqGSM49BAMCA0gAMEUCIQDIoLDR0/J0
9zhMmlKMEPkcXDlyBanV8oLpJq+ofLf9BQIgZvuMobcHdsWuvCAVw0avkAe4GK/b
VN05aa0emYoiQxU=
-----END CERTIFICATE-----
"""
# With the same key, for llm.example.org, but to be shown by clients alone.
CLIENT_CHAIN = """\
-----BEGIN CERTIFICATE-----
MIIBVjCB/KADAgECAgEBMAoGCCqGSM49BAMCMBoxGDAWBgNVBAMMD2xsbS5leGFt
cGxlLm9yZzAeFw0yMDAxMDEwMDAwMDBaFw0yMDAyMDEwMDAwMDBaMBoxGDAWBgNV
BAMMD2xsbS5leGFtcGxlLm9yZzBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABIlv
yl0IHiPVDUKoOiwgbTMYj23tN5qSLX5nUWnDkCxASYh+M7AuqrYqljbxc9aQMrQ1
PV7IzE6SMztUwSy5TvujMzAxMBoGA1UdEQQTMBGCD2xsbS5leGFtcGxlLm9yZzAT
BgNVHSUEDDAKBggrBgEFBQcDAjAKBggqhkjOPQQDAgNJADBGAiEAzHJzm2dCIo44
HGmkph3uoQdG56q/yfAc75cLB7QwtT4CIQDlVrmCj2hP96yPXFuz47hFQeWfdV4t
5QyKFLf7wZgXjA==
-----END CERTIFICATE-----
"""
CHAIN_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk96SJMYpeTSo/b+c
Mk96dImXS2f9GIEzv+yswqAtB7WhRANCAASJb8pdCB4j1Q1CqDosIG0zGI9t7Tea
ki1+Z1Fpw5AsQEmIfjOwLqq2KpY28XPWkDK0NT1eyMxOkjM7VMEsuU77
-----END PRIVATE KEY-----
"""


def check(tmp_path: Path, text: str | bytes | None) -> tuple[int, Path]:
    """The exit code, and the folder with what was written."""
    path, run = tmp_path / "facts.yaml", tmp_path / "run"
    for name in ("", "-traefik", "-prometheus", "-alertmanager", "-boot", "-rollout"):
        (run / f"mini-llm{name}").mkdir(parents=True, exist_ok=True)
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "instance-id").write_text("1\n")
    code = facts.main(path, run, SCHEMA, tmp_path / "instance-id", tmp_path / "facts_of.json", PROMETHEUS)
    return code, run / "mini-llm"


def test_the_example_becomes_keys_and_settings(tmp_path: Path) -> None:
    """The service reads the keys as they were meant, and only its group may; what is commented out is right, too."""
    example = yaml.safe_load((ROOT / "cloud-init" / "node.yaml").read_text())
    [file] = example["write_files"]
    assert (file["path"], file["permissions"]) == ("/etc/mini-llm/facts.yaml", "0600")
    wanted = r"(?m)^# (?=monitoring:|alerts:|  user:|  password_hash:|  webhook:|  watchdog:)"
    content, number = re.subn(wanted, "", file["content"])
    assert number == 6
    code, out = check(tmp_path, content.replace("$apr1$…", "$apr1$f8Vn0cXw$ydb6HbE6kHTv.sEmvvcK/1"))
    assert code == 0
    first, guest, scraper = read_keys(out / "keys.json")
    assert (first.name, first.scopes, first.limits.tokens_per_day) == ("first", frozenset({"generate"}), 200_000)
    assert (guest.scopes, guest.expires) == (frozenset({"generate"}), datetime(2027, 12, 31, tzinfo=UTC))
    assert (scraper.name, scraper.scopes) == ("prometheus", frozenset({"metrics"}))
    scraping = out.with_name("mini-llm-prometheus") / "service.key"
    assert scraping.stat().st_mode & 0o777 == 0o640
    assert hashlib.sha256(scraping.read_bytes()).hexdigest() == scraper.sha256
    assert (out / "node.env").read_text() == "LLM_PRICE_EUR_PER_HOUR=0.0136\n"
    assert (out / "stack.env").read_text() == "MONITORING_URL=https://monitoring.llm.example.org\n"
    assert (out / "keys.json").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in out.iterdir()) == ["keys.json", "node.env", "stack.env"]


def test_a_key_without_scopes_may_generate(tmp_path: Path) -> None:
    """The least that is needed; a price is not."""
    code, out = check(tmp_path, RIGHT)
    assert code == 0
    assert read_keys(out / "keys.json")[0].scopes == frozenset({"generate"})
    assert (out / "node.env").read_text() == ""


def test_addresses_are_listed_for_who_gives_them_to_the_node(tmp_path: Path) -> None:
    """One a line; gone when the facts have none any more."""
    code, out = check(tmp_path, f"{RIGHT}addresses: {{ipv4: 203.0.113.7, ipv6: '2001:db8::1'}}")
    assert code == 0
    assert (out / "addresses").read_text() == "203.0.113.7\n2001:db8::1\n"
    code, out = check(tmp_path, RIGHT)
    assert code == 0
    assert not (out / "addresses").exists()


WRONG = [
    (f"{RIGHT}addresses: {{ipv4: 203.0.113.256}}", "addresses.ipv4: must be an IPv4 address"),
    (f"{RIGHT}addresses: {{ipv4: '2001:db8::1'}}", "addresses.ipv4: must be an IPv4 address"),
    (f"{RIGHT}addresses: {{ipv6: 203.0.113.7}}", "addresses.ipv6: must be an IPv6 address"),
    (f"{RIGHT}price_eur_per_hour: .nan", "price_eur_per_hour: must be a number"),
    (f"{RIGHT}price_eur_per_hour: .inf", "price_eur_per_hour: must be a number"),
    (f"{PLACE}api_keys: [{KEY}, limits: {{parallel: 60.0}}}}]", "api_keys[0].limits.parallel: must be a whole number"),
    (f"{PLACE}api_keys: [{KEY}, limits: {{parallel: true}}}}]", "api_keys[0].limits.parallel: must be a whole number"),
    (f'{PLACE}api_keys: [{{name: a, sha256: "{HASH}\\n"}}]', "api_keys[0].sha256: must be the key's SHA-256"),
    (f'{PLACE}api_keys: [{{name: "a\\n", sha256: {HASH}}}]', "api_keys[0].name: must be 1 to 64"),
    (RIGHT.replace("llm.example.org", "|\n  llm.example.org"), "domain: must be the name that people reach"),
    (f"{RIGHT}domain: b.example.org", "is not YAML: a name stands twice"),
    (f"{PLACE}api_keys: [{KEY}, expires: 2027-02-30T00:00:00Z}}]", "is not YAML: texts with signs"),
    (f"{RIGHT}price_eur_per_hour: 0x_", "is not YAML: "),
    (f'{RIGHT}more: "\\ud800"', "holds half a character"),
    (
        f"domain: a.org\nacme: {{email: a@b.org, authority: '-----BEGIN CERTIFICATE----- x'}}\napi_keys: [{KEY}}}]",
        "acme.authority: is no certificate",
    ),
    (f"{RIGHT}mllm_ZgFn6DbbQjpv2l0DiIOBSsX0sZMvAwr5: 1", "facts: a name is not known here"),
    (None, "is missing: write it with write_files"),
    ("", "facts: must be names with values"),
    ("[]", "facts: must be names with values"),
    ("api_keys: [", "is not YAML: "),
    (b"api_keys: \xff", "is not UTF-8: byte 10"),
    ("api_keys: !!python/object:os.system {}", "is not YAML: texts with signs"),
    ("a" * 40_000, "is longer than 32768 bytes"),
    (f"api_keys: [{KEY}}}]", "facts: domain is missing"),
    (PLACE, "facts: api_keys is missing"),
    (f"domain: llm\napi_keys: [{KEY}}}]", "domain: must be the name that people reach this node by"),
    (f"domain: a.org`) || Path(`/metrics\napi_keys: [{KEY}}}]", "domain: must be the name that people reach"),
    (f"domain: a.org\napi_keys: [{KEY}}}]", "facts: one of acme (to order the certificate) and certificate"),
    (f"domain: a.org\nacme: {{}}\napi_keys: [{KEY}}}]", "acme: email is missing"),
    (f"domain: a.org\nacme: {{email: me}}\napi_keys: [{KEY}}}]", "acme.email: must be an e-mail address"),
    (RIGHT.replace("a@example.org", "a@b.org, server: http://x"), "acme.server: must be the https:// address"),
    (f"domain: a.org\ncertificate: {{chain: x, key: y}}\napi_keys: [{KEY}}}]", "certificate.chain: must be the"),
    (PLACE + "api_keys: []", "api_keys: who may use the service, at least one"),
    (PLACE + "api_keys: {}", "api_keys: must be a list"),
    (PLACE + "api_keys: [x]", "api_keys[0]: must be names with values"),
    (f"{RIGHT}api_key: [{KEY}}}]", "facts: 'api_key' is not known here; known are domain, acme, certificate,"),
    (PLACE + "api_keys: [{name: a}]", "api_keys[0]: sha256 is missing"),
    (f"{PLACE}api_keys: [{{sha256: {HASH}}}]", "api_keys[0]: name is missing"),
    (f"{PLACE}api_keys: [{{name: a b, sha256: {HASH}}}]", "api_keys[0].name: must be 1 to 64 letters"),
    (PLACE + "api_keys: [{name: a, sha256: mllm_secret}]", "api_keys[0].sha256: must be the key's SHA-256"),
    (f"{PLACE}api_keys: [{KEY}, scopes: [root]}}]", "api_keys[0].scopes[0]: must be generate, metrics or admin"),
    (f"{PLACE}api_keys: [{KEY}, scopes: generate}}]", "api_keys[0].scopes: must be a list"),
    (f"{PLACE}api_keys: [{KEY}, expires: soon}}]", "api_keys[0].expires: must be a time with its zone"),
    (f"{PLACE}api_keys: [{KEY}, expires: 2027-01-31}}]", "api_keys[0].expires: must be a time with its zone"),
    (f"{PLACE}api_keys: [{KEY}, limits: {{parallel: 0}}}}]", "api_keys[0].limits.parallel: must be a whole number"),
    (f"{PLACE}api_keys: [{KEY}, limits: {{paralel: 1}}}}]", "api_keys[0].limits: 'paralel' is not known here"),
    (RIGHT.replace("name: a", "name: prometheus"), "api_keys: the name prometheus is taken"),
    (f"{RIGHT}monitoring: {{user: me}}", "monitoring: password_hash is missing"),
    (f"{RIGHT}monitoring: {{user: 'a:b', password_hash: '{HASHED}'}}", "monitoring.user: must be 1 to 64 letters"),
    (f"{RIGHT}monitoring: {{user: me, password_hash: secret}}", "monitoring.password_hash: must be what openssl"),
    (f"{RIGHT}monitoring: {{user: me, password_hash: $2y$12${'a' * 53}}}", "bcrypt of a cost from 4 to 6"),
    (f"{RIGHT}alerts: {{}}", "alerts: who hears of alerts: a webhook, mail, or both"),
    (f"{RIGHT}alerts: {{watchdog: me}}", "alerts.watchdog: must be the http:// or https:// address of who gives alarm"),
    (f"{RIGHT}alerts: {{webhook: me}}", "alerts.webhook: must be the http:// or https:// address"),
    *(
        (f"{RIGHT}alerts: {{webhook: '{address}'}}", "alerts.webhook: must be the http:// or https:// address")
        for address in ("https://[::1/x", "https://h:port/x", "https://h:99999/", "https://h/%zz", "https://h/{{x}}")
    ),
    (f"{RIGHT}alerts: {{mail: {{{MAIL}, username: a, password: \U0001f511}}}}", "alerts.mail.password: must be the"),
    (f"{RIGHT}alerts: {{mail: {{to: a@b.org, from: a@b.org}}}}", "alerts.mail: smarthost is missing"),
    (f"{RIGHT}alerts: {{mail: {{to: a@b.org, from: b, smarthost: 'b:25'}}}}", "alerts.mail.from: must be an e-mail"),
    (f"{RIGHT}alerts: {{mail: {{{MAIL}, username: a}}}}", "alerts.mail: password is missing beside username"),
    (f"{PLACE}api_keys: [{KEY}}}, {KEY}}}]", "api_keys: two of them have the same name"),
    (f"{PLACE}api_keys: [{KEY}}}]\nprice_eur_per_hour: cheap", "price_eur_per_hour: must be a number"),
    (f"{PLACE}api_keys: [{KEY}}}]\nprice_eur_per_hour: -1", "price_eur_per_hour: must be a number from 0 to 10000"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message[:50] for _, message in WRONG])
def test_wrong_facts_are_told_and_nothing_else_is_written(
    tmp_path: Path, text: str | bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the console and in the problem file; what an earlier start had written is gone."""
    check(tmp_path, RIGHT)
    if text is None:
        (tmp_path / "facts.yaml").unlink()
    capsys.readouterr()
    code, out = check(tmp_path, text)
    assert code == 1
    assert sorted(path.name for path in out.iterdir()) == ["problem", "stack.env"]
    assert message in (out / "problem").read_text().splitlines()[0]
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("domain", "chain", "watched", "refused"),
    [
        ("llm.example.org", CHAIN, True, {}),
        ("x.llm.example.org", CHAIN, False, {}),
        ("x.llm.example.org", CHAIN, True, {"monitoring.x.llm.example.org": "it is for other names"}),
        *(
            (f"{name}.example.org", CHAIN, False, {f"{name}.example.org": "it is for other names"})
            for name in ("other", "y.x.llm", "llm.example.org.evil")
        ),
        ("llm.example.org", CLIENT_CHAIN, False, {"llm.example.org": "unsuitable certificate purpose"}),
    ],
)
def test_a_certificate_must_be_one_for_the_node_s_names(
    tmp_path: Path, domain: str, chain: str, watched: bool, refused: dict[str, str]
) -> None:
    """Those by which it is reached, the monitoring's among them; whether it has ended is for an alert to say."""
    told: dict[str, object] = {
        "domain": domain,
        "certificate": {"chain": chain, "key": CHAIN_KEY},
        "api_keys": [{"name": "a", "sha256": HASH}],
        **({"monitoring": {"user": "me", "password_hash": HASHED}} if watched else {}),
    }
    code, out = check(tmp_path, json.dumps(told))
    assert code == (1 if refused else 0)
    problems = (out / "problem").read_text().splitlines() if refused else []
    assert problems == [f"certificate: no client would take it for {name} ({why})" for name, why in refused.items()]


def test_a_key_that_stands_where_its_hash_should_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The console and /ready are read by others than the key's owner."""
    _, out = check(tmp_path, PLACE + "api_keys: [{name: a, sha256: mllm_secret}]")
    assert "mllm_secret" not in (out / "problem").read_text() + capsys.readouterr().out


@pytest.mark.parametrize("password", ["!S3cret", "*S3cret", "&S3cret x", "{S3cret", "@S3cret", "2027-02-30 S3cret"])
def test_what_is_no_yaml_is_not_told(tmp_path: Path, password: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It may be a password that somebody forgot to quote."""
    _, out = check(tmp_path, f"{RIGHT}alerts:\n  mail: {{{MAIL}, username: a, password: {password}}}\n")
    told = [path.read_text() for path in [out / "problem"] if path.exists()]
    assert "S3cret" not in "".join(told) + capsys.readouterr().out


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    """One boot is enough to know them all."""
    _, out = check(tmp_path, PLACE + "api_keys: [{name: a b, sha256: 1}]\nprice_eur_per_hour: x\nmore: 1\n")
    assert len((out / "problem").read_text().splitlines()) == 4


def test_the_schema_is_one() -> None:
    """And knows nothing that its own rules would pass over."""
    facts.jsonschema.Draft202012Validator.check_schema(json.loads(SCHEMA.read_text()))


def test_a_proof_and_a_handover_are_for_those_who_need_them(tmp_path: Path) -> None:
    """The proof's key is one of the service's; the handover's key is root's alone, and goes when the facts lose it."""
    pair = make_pair(datetime.now(UTC))
    more = {"proof": {"sha256": "c" * 64, "expires": "2099-01-31T12:00:00Z"}, "addresses": {"ipv4": "203.0.113.5"}}
    right = {**yaml.safe_load(RIGHT), **more, "handover": {**pair, "take_over": False}}
    code, out = check(tmp_path, json.dumps(right))
    assert code == 0
    keys = {key["name"]: key for key in json.loads((out / "keys.json").read_text())["keys"]}
    assert keys["proof"]["sha256"] == "c" * 64
    assert keys["proof"]["scopes"] == ["generate"]
    assert (out / "proof").read_text() == "c" * 64 + "\n"
    rollout = out.with_name("mini-llm-rollout")
    assert {path.name: path.stat().st_mode & 0o777 for path in rollout.iterdir() if path.suffix} == {
        "certificate.pem": 0o600,
        "key.pem": 0o600,
    }
    assert (rollout / "alone").exists()
    assert check(tmp_path, RIGHT)[0] == 0
    assert list(rollout.iterdir()) == []
    other = make_pair(datetime.now(UTC))
    for wrong, reason in (
        ({"handover": {**pair, "key": other["key"]}}, "handover: certificate and key do not fit each other"),
        ({"addresses": None}, "handover: addresses is missing beside it"),
        ({"proof": {"sha256": "c" * 64, "expires": "tomorrow"}}, "proof.expires: must be a time with its zone"),
        ({"proof": {"sha256": right["api_keys"][0]["sha256"], "expires": "2099-01-31T12:00:00Z"}}, "the same sha256"),
    ):
        mixed = {name: value for name, value in {**right, **wrong}.items() if value is not None}
        code, out = check(tmp_path, json.dumps(mixed))
        assert code == 1
        assert reason in (out / "problem").read_text()


def test_a_check_that_breaks_leaves_a_node_that_does_not_serve(tmp_path: Path) -> None:
    """Whatever it breaks on; keys of an earlier check are gone as well."""
    _, out = check(tmp_path, RIGHT)
    with pytest.raises(FileNotFoundError):
        facts.main(*(tmp_path / name for name in ("facts.yaml", "run", "no-schema", "instance", "memory")), PROMETHEUS)
    assert sorted(path.name for path in out.iterdir()) == ["problem", "stack.env"]
    assert (out / "problem").read_text() == "this node's facts were not checked\n"


def test_facts_of_the_server_that_a_snapshot_was_made_of_are_refused(tmp_path: Path) -> None:
    """A new server without facts of its own must not serve by another's keys; once it has some, it does."""
    check(tmp_path, RIGHT)

    def boot(instance: str) -> int:
        (tmp_path / "instance-id").write_text(instance)
        paths = [tmp_path / name for name in ("facts.yaml", "run")]
        code: int = facts.main(*paths, SCHEMA, tmp_path / "instance-id", tmp_path / "facts_of.json", PROMETHEUS)
        return code

    assert boot("1") == 0
    assert boot("2") == 1
    assert "is another server's" in (tmp_path / "run" / "mini-llm" / "problem").read_text()
    assert boot("2") == 1  # a reboot makes them no better
    (tmp_path / "facts.yaml").write_text(RIGHT)
    assert boot("2") == 0
    assert boot("2") == 0


def test_a_reboot_begins_no_takeover_that_is_over(tmp_path: Path) -> None:
    """Else the next node waits for its end, for ever."""
    right = {**yaml.safe_load(RIGHT), "addresses": {"ipv4": "203.0.113.5"}, "handover": make_pair(datetime.now(UTC))}

    def state() -> str:
        code, folder = check(tmp_path, yaml.safe_dump(right))
        assert code == 0
        return str(json.loads((folder / "rollout.json").read_text())["state"])

    assert state() == "looking"
    (tmp_path / "took-over").touch()
    assert state() == "finished"


def test_facts_that_others_could_read_are_closed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They may hold a key; cloud-init leaves files open unless told otherwise."""
    (tmp_path / "facts.yaml").write_text(RIGHT)
    (tmp_path / "facts.yaml").chmod(0o644)
    assert check(tmp_path, RIGHT)[0] == 0
    assert (tmp_path / "facts.yaml").stat().st_mode & 0o777 == 0o600
    assert "could be read by others" in capsys.readouterr().out


def test_whatever_is_wrong_can_be_told_through_the_proxy(tmp_path: Path) -> None:
    """Its configuration shows /health and /ready alone, with a limit on the wait; with right facts there is more."""
    told = "Path(`/health`) || Path(`/ready`)"
    for text, shown in (("[]", told), (RIGHT, f"Host(`llm.example.org`) && ({told})")):
        check(tmp_path, text)
        routes = json.loads((tmp_path / "run" / "mini-llm-traefik" / "dynamic" / "node.yaml").read_text())["http"]
        assert routes["routers"]["state"]["rule"].startswith(shown)
        assert routes["serversTransports"]["state"]["forwardingTimeouts"]["responseHeaderTimeout"] == "5s"
        assert (text == RIGHT) == ("metrics" in routes["routers"]["llm"]["rule"])

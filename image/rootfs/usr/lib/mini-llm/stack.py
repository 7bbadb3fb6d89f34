"""Owns what the containers read: files for Traefik, Prometheus and Alertmanager, made of a node's facts.

All of it is text by name; ``facts.py`` says where it goes and who may read it. YAML reads JSON, so JSON is written.
"""

import json
from typing import Any

_LETS_ENCRYPT = "https://acme-v02.api.letsencrypt.org/directory"
_LARGEST_HEADERS_BYTES = 16 << 10
_WATCHDOG = "Watchdog"
LONGEST_ANSWER_S = 330  # the service's own limit for answers when it drains, and a little
# Where each program listens; only Traefik's http and https are open to the outside.
SERVICE, TRAEFIK, REPORT, ROLLOUT = (f"127.0.0.1:{port}" for port in (8080, 8082, 8083, 8084))
GRAFANA, PROMETHEUS, ALERTMANAGER = "127.0.0.1:3000", "127.0.0.1:9090", "127.0.0.1:9093"
_BY_CLIENT = {"ipStrategy": {"ipv6Subnet": 64}}  # an IPv6 client has all addresses of its network


def monitoring_host(facts: dict[str, Any] | None) -> str | None:
    """The name that the monitoring is reached by, or None where the facts do not open it."""
    return f"monitoring.{facts['domain']}" if facts and "monitoring" in facts else None


def compose_settings(facts: dict[str, Any]) -> dict[str, str]:
    """Variables of the compose file: where links in alerts and pages lead."""
    host = monitoring_host(facts)
    return {"MONITORING_URL": f"https://{host}" if host else f"http://{GRAFANA}"}


def prometheus_rules(facts: dict[str, Any] | None) -> str:
    """Rules beside those of the image: with a watchdog, an alert that always fires, so that its end tells something."""
    if "watchdog" not in (facts or {}).get("alerts", {}):
        return _as_json({"groups": []})
    rule = {"alert": _WATCHDOG, "expr": "vector(1)", "labels": {"severity": "none"}}
    return _as_json({"groups": [{"name": "watchdog", "rules": [rule]}]})


def prometheus_file(document: dict[str, Any], node: str) -> str:
    """The image's configuration, with this node's name on all that is measured.

    The next node takes the history over, and what two nodes measured at the same time must not be one series.
    """
    jobs = [
        {**job, "static_configs": [{**each, "labels": {"node": node}} for each in job["static_configs"]]}
        for job in document["scrape_configs"]
    ]
    return _as_json({**document, "scrape_configs": jobs})


def alertmanager_file(facts: dict[str, Any] | None) -> str:
    """Alertmanager's configuration: one receiver, told at once, again twice a day, and when it is over.

    The watchdog is another's, who hears of it every five minutes and gives alarm when he does not.
    """
    receiver: dict[str, Any] = {"name": "operator"}
    alerts = (facts or {}).get("alerts", {})
    if "webhook" in alerts:
        receiver["webhook_configs"] = [{"url": alerts["webhook"], "send_resolved": True}]
    if "mail" in alerts:
        mail = alerts["mail"]
        own = {"auth_username": mail["username"], "auth_password": mail["password"]} if "username" in mail else {}
        names = {name: mail[name] for name in ("to", "from", "smarthost")}
        receiver["email_configs"] = [{**names, **own, "require_tls": True, "send_resolved": True}]
    receivers = [receiver]
    route: dict[str, Any] = {
        "receiver": "operator",
        "group_by": ["alertname"],
        "group_wait": "10s",
        "group_interval": "1m",
        "repeat_interval": "12h",
    }
    if "watchdog" in alerts:
        receivers.append({"name": "watchdog", "webhook_configs": [{"url": alerts["watchdog"], "send_resolved": False}]})
        route["routes"] = [
            {
                "receiver": "watchdog",
                "matchers": [f'alertname="{_WATCHDOG}"'],
                "group_wait": "0s",
                # It is told at each interval, since by then the last word is older than what may be repeated.
                "group_interval": "5m",
                "repeat_interval": "4m",
            }
        ]
    return _as_json({"route": route, "receivers": receivers})


def traefik_files(facts: dict[str, Any] | None) -> dict[str, str]:
    """Traefik's files by name, from facts that are right, or for a node that only tells what is wrong with them."""
    files = {"traefik.yaml": _traefik(facts or {}), "dynamic/node.yaml": _routes(facts)}
    texts = {name: _as_json(document) for name, document in files.items()}
    if facts and "acme" in facts:
        # For who looks after the orders, a name a line.
        texts["ordered"] = "".join(f"{name}\n" for name in (facts["domain"], monitoring_host(facts)) if name)
        texts |= {"acme-authority.pem": facts["acme"]["authority"]} if "authority" in facts["acme"] else {}
        if "addresses" in facts:
            # They lead here later; whoever takes over from other nodes tells when.
            texts["arrival"] = "told\n" if "handover" in facts else "untold\n"
    if facts and "certificate" in facts:
        texts |= {"certificate.pem": facts["certificate"]["chain"], "certificate.key": facts["certificate"]["key"]}
    return texts


def _traefik(facts: dict[str, Any]) -> dict[str, Any]:
    timeouts = {"readTimeout": "60s", "writeTimeout": "0s", "idleTimeout": "180s"}
    long = {
        # Answers on a CPU take minutes: what was accepted may finish, and only requests have to be quick.
        "lifeCycle": {"requestAcceptGraceTimeout": "2s", "graceTimeOut": f"{LONGEST_ANSWER_S}s"},
        "respondingTimeouts": timeouts,
        "keepAliveMaxTime": "600s",
    }
    small: dict[str, Any] = {"maxHeaderBytes": _LARGEST_HEADERS_BYTES}
    to_https = {"redirections": {"entryPoint": {"to": "https", "scheme": "https", "permanent": True}}}
    # Nothing is sent to port 80 but lines of headers. Orders' challenges have a route of Traefik's, which no limit but
    # an entry point's own reaches.
    limited = {**to_https, **small, "middlewares": ["rate@file"]}
    quick = {**long, "respondingTimeouts": {**timeouts, "readTimeout": "10s"}}
    # A slash that only the program behind would see makes another path of it than the routes have looked at.
    plain = {**small, "encodedCharacters": {"allowEncodedSlash": False}}
    document: dict[str, Any] = {
        "global": {"checkNewVersion": False, "sendAnonymousUsage": False},
        "entryPoints": {
            "http": {"address": ":80", "http": limited, "transport": quick},
            "https": {"address": ":443", "http": plain, "transport": long},
            "metrics": {"address": TRAEFIK},
        },
        "providers": {"file": {"directory": "/etc/traefik/dynamic", "watch": True}},
        "metrics": {"prometheus": {"entryPoint": "metrics"}},
        "log": {"level": "INFO", "format": "json"},
        # Neither headers, which hold keys, nor the request's line, which holds the query. Names that lead nowhere meet
        # no limit, and what goes beyond one has no end: with their lines a stranger could push everybody else's out of
        # the journal.
        "accessLog": {
            "format": "json",
            "filters": {"statusCodes": ["100-403", "405-428", "430-599"]},
            "fields": {
                "names": dict.fromkeys(
                    ("RequestPath", "RequestLine", "RequestHost", "RequestAddr", "ClientUsername"), "drop"
                ),
                "headers": {"defaultMode": "drop"},
            },
        },
    }
    if "acme" in facts:
        acme = facts["acme"]
        challenge = "tlsChallenge" if acme.get("challenge") == "tls-alpn-01" else "httpChallenge"
        document["certificatesResolvers"] = {
            "acme": {
                "acme": {
                    "email": acme["email"],
                    "caServer": acme.get("server", _LETS_ENCRYPT),
                    "storage": "/data/acme.json",
                    "keyType": "EC256",
                    **({"caCertificates": ["/etc/traefik/acme-authority.pem"]} if "authority" in acme else {}),
                    challenge: {} if challenge == "tlsChallenge" else {"entryPoint": "http"},
                }
            }
        }
    return document


def _routes(facts: dict[str, Any] | None) -> dict[str, Any]:
    tls: dict[str, Any] = {"certResolver": "acme"} if facts and "acme" in facts else {}
    told = "Path(`/health`) || Path(`/ready`)"
    rule = f"Host(`{facts['domain']}`) && !PathPrefix(`/metrics`)" if facts else "Path(`/ready`)"
    own = {"entryPoints": ["https"], "tls": tls}
    hardened = {
        "stsSeconds": 31_536_000,
        "contentTypeNosniff": True,
        "frameDeny": True,
        "referrerPolicy": "no-referrer",
        "customResponseHeaders": {"Server": ""},
    }
    service = _balanced(SERVICE)
    # Shorter than the service keeps a connection (15 s), or a request could meet its end.
    timeouts = {"dialTimeout": "5s", "idleConnTimeout": "10s"}
    document: dict[str, Any] = {
        "http": {
            "routers": {
                "llm": {**own, "rule": rule, "service": "llm", "middlewares": ["hardened", "rate", "parallel"]},
                # The longer rule goes first. These two answer at once or never.
                "state": {
                    **own,
                    "rule": f"Host(`{facts['domain']}`) && ({told})" if facts else told,
                    "service": "state",
                    "middlewares": ["hardened", "rate"],
                },
            },
            "middlewares": {
                "hardened": {"headers": hardened},
                # By client address; the service's own limits, by key, are finer and lie behind these.
                "rate": {"rateLimit": {"average": 50, "burst": 100, "sourceCriterion": _BY_CLIENT}},
                "parallel": {"inFlightReq": {"amount": 64, "sourceCriterion": _BY_CLIENT}},
            },
            "services": {
                "llm": {"loadBalancer": {**service, "serversTransport": "llm"}},
                "state": {"loadBalancer": {**service, "serversTransport": "state"}},
            },
            "serversTransports": {
                "llm": {"forwardingTimeouts": timeouts},
                "state": {"forwardingTimeouts": {**timeouts, "responseHeaderTimeout": "5s"}},
            },
        },
        "tls": {"options": {"default": {"minVersion": "VersionTLS12"}}},
    }
    if facts and "certificate" in facts:
        pair = {"certFile": "/etc/traefik/certificate.pem", "keyFile": "/etc/traefik/certificate.key"}
        document["tls"]["certificates"] = [pair]
        # Also where a client asks by address, or by a name that the certificate does not have.
        document["tls"]["stores"] = {"default": {"defaultCertificate": pair}}
    if facts and "proof" in facts:
        # For who launches this node, by a key of its own; before the service's routes, whatever their length.
        asked = {"rule": f"Host(`{facts['domain']}`) && Path(`/rollout`)", "priority": 1000, "service": "rollout"}
        document["http"]["routers"]["rollout"] = {**own, **asked, "middlewares": ["hardened", "seldom", "one"]}
        # Each question is a process, of which there are four at a time; whoever launches the node asks one by one.
        document["http"]["middlewares"]["seldom"] = {
            "rateLimit": {"average": 3, "burst": 6, "sourceCriterion": _BY_CLIENT}
        }
        document["http"]["middlewares"]["one"] = {"inFlightReq": {"amount": 1, "sourceCriterion": _BY_CLIENT}}
        document["http"]["services"]["rollout"] = {"loadBalancer": _balanced(ROLLOUT)}
    if facts and "monitoring" in facts:
        _add_monitoring(document["http"], facts, own)
    return document


def _add_monitoring(http: dict[str, Any], facts: dict[str, Any], own: dict[str, Any]) -> None:
    """Routes of the monitoring's own name: Grafana, and reading alone of two APIs and the node's report."""
    # A password's hash takes the longer, the longer the password is, and a stranger's may be of any length.
    host = f"Host(`{monitoring_host(facts)}`) && !HeaderRegexp(`Authorization`, `^.{{300}}`)"
    reading = f"{host} && (Method(`GET`) || Method(`HEAD`))"
    apis = {"prometheus": ("/api/v1/", PROMETHEUS), "alertmanager": ("/api/v2/", ALERTMANAGER)}
    others = " && ".join(f"!PathPrefix(`/{name}/`)" for name in apis)
    chain = ["hardened", "browse", "operator"]
    user = facts["monitoring"]
    http["middlewares"] |= {
        # A page of Grafana is some hundred files; each costs a look at the password.
        "browse": {"rateLimit": {"average": 50, "burst": 300, "sourceCriterion": _BY_CLIENT}},
        # The password stays here: none of the programs behind it needs one.
        "operator": {
            "basicAuth": {
                "users": [f"{user['user']}:{user['password_hash']}"],
                "removeHeader": True,
                "realm": "mini-llm monitoring",
            }
        },
    }
    # Alerts name Prometheus' page of their expression, under its external address; the dashboards stand for it.
    http["middlewares"]["dashboards"] = {
        "redirectRegex": {"regex": "^(https?://[^/]+)/graph.*", "replacement": "${1}/"}
    }
    graph = {"rule": f"{host} && Path(`/graph`)", "priority": 1000, "service": "grafana"}
    graph["middlewares"] = [*chain, "dashboards"]
    # Grafana hands on to a data source whatever is asked under these, by any method: Prometheus' admin API, too. The
    # dashboards ask under /api/ds/query.
    handed_on = "PathRegexp(`(?i)/(resources?|proxy)(/|$)`)"
    pages = {
        "rule": f"{host} && {others} && !Path(`/node`) && !{handed_on}",
        "service": "grafana",
        "middlewares": chain,
    }
    report = {"rule": f"{reading} && Path(`/node`)", "service": "report", "middlewares": chain}
    http["routers"] |= {"graph": {**own, **graph}, "grafana": {**own, **pages}, "report": {**own, **report}}
    http["services"] |= {"grafana": {"loadBalancer": _balanced(GRAFANA)}, "report": {"loadBalancer": _balanced(REPORT)}}
    for name, (path, address) in apis.items():
        rule = f"{reading} && PathPrefix(`/{name}{path}`)"
        http["routers"][name] = {**own, "rule": rule, "service": name, "middlewares": [*chain, f"{name}-path"]}
        http["middlewares"][f"{name}-path"] = {"stripPrefix": {"prefixes": [f"/{name}"]}}
        http["services"][name] = {"loadBalancer": _balanced(address)}


def _balanced(address: str) -> dict[str, Any]:
    # A piece is sent when it is there.
    return {"servers": [{"url": f"http://{address}"}], "responseForwarding": {"flushInterval": "-1ms"}}


def _as_json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=1) + "\n"

"""Owns the three drawings as data: a request, a bake, a rollout; their facts are those of ARCHITECTURE.md."""

from tests.pictures.layout import Arrow, Box, Cells, Drawing, Frame

REQUEST = Drawing(
    "request",
    "The way of a request",
    "From the client by the floating address to Traefik, which ends TLS; on through gunicorn's socket into the web "
    "worker, where gate, checks and admission come before the scheduler; the engine, a process of its own, runs the "
    "model; the answer streams back the same way. Prometheus asks Traefik and service for their metrics.",
    boxes=(
        Box("client", Cells(0, 0, 1, 5), "Client", ("curl,", "browser,", "OpenAI's", "library")),
        Box("address", Cells(1, 0, 1, 5), "Address", ("floating:", "it stays,", "nodes go")),
        Box("traefik", Cells(2, 0, 1, 5), "Traefik", ("ends TLS,", "limits by", "address,", "streams", "unbuffered")),
        Box("gunicorn", Cells(3, 0), "gunicorn", ("systemd's socket,", "deadlines for slow clients"), "own"),
        Box("gate", Cells(3, 1), "Gate", ("key, scope, requests a minute",), "own"),
        Box("admission", Cells(3, 2), "Admission", ("bounds, exact count, tokens", "reserved, audit line"), "own"),
        Box("scheduler", Cells(3, 3), "Scheduler", ("fair turns, deadlines, drain",), "own"),
        Box("answer", Cells(3, 4), "Answer", ("JSON or events as they come;", "metrics, log, audit line"), "own"),
        Box("engine", Cells(4, 3, 1, 2), "Engine", ("its own process,", "gpt4all and", "llama.cpp"), "cloud"),
        Box("prometheus", Cells(4, 0), "Prometheus", ("looks at service,", "Traefik and host")),
    ),
    arrows=(
        Arrow("client", "address", "request", "request", 0),
        Arrow("address", "traefik", "", "request", 0),
        Arrow("traefik", "gunicorn", "", "request"),
        Arrow("gunicorn", "gate", "", "request"),
        Arrow("gate", "admission", "", "request"),
        Arrow("admission", "scheduler", "", "request"),
        Arrow("scheduler", "engine", "prompt", "request"),
        Arrow("engine", "answer", "tokens", "answer"),
        Arrow("answer", "traefik", "", "answer"),
        Arrow("traefik", "address", "", "answer", 4),
        Arrow("address", "client", "answer", "answer", 4),
        Arrow("prometheus", "gunicorn", dashed=True),
    ),
    frames=(
        Frame("a node", Cells(2, 0, 3, 5)),
        Frame("web worker (Falcon)", Cells(3, 0, 1, 5)),
    ),
)

BAKE = Drawing(
    "bake",
    "The way of a bake",
    "bake.py looks at all that can be known beforehand; Packer bakes the layers model, base, stack and service on a "
    "server at the cloud, beginning from the snapshot of an earlier layer where there is one; the snapshot is a "
    "candidate until a probe that was booted from it has passed all checks; then it is labelled verified, promoted, "
    "and written to the file that Terraform reads.",
    boxes=(
        Box("preflight", Cells(0, 0), "1 Preflight", ("token, tools,", "offers, price"), "own"),
        Box("packer", Cells(1, 0), "2 Packer", ("what is not there", "yet, layer by layer"), "own"),
        Box("label", Cells(2, 0), "5 Label", ("candidate", "becomes verified"), "own"),
        Box("checks", Cells(3, 0), "4 Checks", ("answer, boot time,", "open ports, audit"), "own"),
        Box("promote", Cells(4, 0), "6 Promote", ("the channel", "stable moves"), "own"),
        Box("kept", Cells(0, 1, 1, 3), "Kept layers", ("the next bake", "begins from their", "snapshots"), "cloud"),
        Box("model", Cells(1, 1), "model"),
        Box("base", Cells(1, 2), "base"),
        Box("stack", Cells(1, 3), "stack"),
        Box("service", Cells(1, 4), "service"),
        Box("snapshot", Cells(2, 1, 1, 4), "Snapshot", ("of a server", "that is off"), "cloud"),
        Box("probe", Cells(3, 1, 1, 4), "3 Probe", ("booted from it,", "on the type that", "will launch it"), "cloud"),
        Box("file", Cells(4, 1, 1, 2), "Image's id", ("image.auto.", "tfvars.json")),
        Box("terraform", Cells(4, 3, 1, 2), "Terraform", ("launches it",)),
    ),
    arrows=(
        Arrow("preflight", "packer"),
        Arrow("packer", "model"),
        Arrow("kept", "model", at=1, both=True, dashed=True),
        Arrow("kept", "stack", at=3, both=True, dashed=True),
        Arrow("model", "base"),
        Arrow("base", "stack"),
        Arrow("stack", "service"),
        Arrow("service", "snapshot"),
        Arrow("snapshot", "probe", "", "line", 2),
        Arrow("checks", "probe", both=True),
        Arrow("checks", "label", "", "answer"),
        Arrow("label", "snapshot", "", "answer"),
        Arrow("checks", "promote", "", "answer"),
        Arrow("promote", "file", "", "answer"),
        Arrow("file", "terraform", "", "answer"),
    ),
    frames=(
        Frame("bake.py", Cells(0, 0, 5, 1)),
        Frame("the cloud", Cells(0, 1, 4, 4)),
        Frame("a server", Cells(1, 1, 1, 4)),
    ),
)

ROLLOUT = Drawing(
    "rollout",
    "The way of a rollout",
    "First a new node finds the old one in the private network, takes over certificate, keys, counters and audit log "
    "from it, and is proved at its own address, while the old one serves. Then the floating addresses move to the new"
    " node, and packets of connections that were open go through a tunnel to the old node until it has given its last"
    " answer. At last the old node hands over its last counters, audit files and history, and goes.",
    boxes=(
        Box("clients1", Cells(0, 0, 2), "Clients"),
        Box("address1", Cells(0, 1, 2), "Floating addresses", ("lead to the old node",)),
        Box("old1", Cells(0, 2), "Old node", ("serves on,", "hands over"), "cloud"),
        Box("new1", Cells(1, 2), "New node", ("proved at its", "own address"), "own"),
        Box("private1", Cells(0, 3, 2), "Private network, TLS", ("certificate, counters,", "revoked keys, audit")),
        Box("clients2", Cells(2, 0, 2), "Clients"),
        Box("address2", Cells(2, 1, 2), "Floating addresses", ("IPv6 first, then IPv4",)),
        Box("old2", Cells(2, 2), "Old node", ("gives its", "last answers"), "cloud"),
        Box("new2", Cells(3, 2), "New node", ("serves,", "hands on"), "own"),
        Box("private2", Cells(2, 3, 2), "Tunnel", ("packets of open", "connections, both ways")),
        Box("clients3", Cells(4, 0, 2), "Clients"),
        Box("address3", Cells(4, 1, 2), "Floating addresses", ("lead to the new node",)),
        Box("old3", Cells(4, 2), "Old node", ("is done,", "is deleted")),
        Box("new3", Cells(5, 2), "New node", ("proved by", "the real name"), "own"),
        Box("private3", Cells(4, 3, 2), "Private network, TLS", ("last counters, audit", "files, history")),
    ),
    arrows=(
        Arrow("clients1", "address1", "", "request", 0),
        Arrow("address1", "old1", "", "request"),
        Arrow("old1", "private1"),
        Arrow("private1", "new1"),
        Arrow("clients2", "address2", "", "request", 3),
        Arrow("address2", "new2", "", "request"),
        Arrow("new2", "private2", "", "request", both=True),
        Arrow("private2", "old2", "", "request", both=True),
        Arrow("clients3", "address3", "", "request", 5),
        Arrow("address3", "new3", "", "request"),
        Arrow("old3", "private3"),
        Arrow("private3", "new3"),
    ),
    frames=(
        Frame("1 Takeover", Cells(0, 0, 2, 4)),
        Frame("2 The addresses move", Cells(2, 0, 2, 4)),
        Frame("3 The old node goes", Cells(4, 0, 2, 4)),
    ),
)

DRAWINGS = (REQUEST, BAKE, ROLLOUT)

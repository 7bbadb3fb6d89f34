"""Owns a webhook for tests: an HTTP server on an address that servers reach, which keeps what Alertmanager posts."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Webhook:
    """One that runs; ``fired`` are the alerts that came, ``over`` those whose last word is that they are resolved.

    One that is ``deaf`` refuses what is posted; what comes to the watchdog's address is counted alone, as ``pings``.
    """

    def __init__(self, host: str):
        webhook = self
        self.fired: set[str] = set()
        self.over: set[str] = set()
        self.links: set[str] = set()
        self.deaf = False
        self.pings = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                pinged = self.path == "/watchdog"
                webhook.pings += pinged
                for alert in [] if webhook.deaf or pinged else told["alerts"]:
                    webhook.links |= {told["externalURL"], alert["generatorURL"]}
                    name, firing = alert["labels"]["alertname"], alert["status"] == "firing"
                    webhook.fired |= {name} if firing else set()
                    webhook.over = webhook.over - {name} if firing else webhook.over | {name}
                self.send_response(503 if webhook.deaf else 200)
                self.end_headers()

            def log_message(self, *words: object) -> None:
                """Nobody reads it."""

        self.server = ThreadingHTTPServer((host, 0), Handler)
        root = f"http://{host}:{self.server.server_address[1]}"
        self.address, self.watchdog = f"{root}/alerts", f"{root}/watchdog"


@contextmanager
def running_webhook(host: str) -> Iterator[Webhook]:
    """A webhook on an address of this host; gone afterwards."""
    webhook = Webhook(host)
    thread = threading.Thread(target=webhook.server.serve_forever)
    thread.start()
    try:
        yield webhook
    finally:
        webhook.server.shutdown()
        thread.join()
        webhook.server.server_close()

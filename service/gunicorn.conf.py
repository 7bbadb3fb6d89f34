"""Owns how gunicorn runs the service: one worker process, many threads, hooks that start and stop the engine."""

import ctypes
import gc
import sys
from typing import Any

from service.errors import ServiceError, SettingsInvalid
from service.settings import check_folders, read_settings
from service.web_worker import WebWorker

try:
    _settings = read_settings()
    check_folders(_settings)
except SettingsInvalid as invalid:
    sys.exit("\n".join(f"error: {problem}" for problem in invalid.problems))

# glibc gives each thread an arena of its own, and keeps in each what a large body took: 381 MB after a rush of them, 40
# with two arenas that give back what is free at their end. The worker is forked, so it has this too. malloc.h:
# M_ARENA_MAX is -8, M_TRIM_THRESHOLD -1.
_malloc = ctypes.CDLL(None)
_malloc.mallopt(-8, 2)
_malloc.mallopt(-1, 256 << 10)

wsgi_app = "service.wsgi:application"
bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
worker_class = WebWorker
WebWorker.header_timeout_s = _settings.header_timeout_s
WebWorker.body_timeout_s = _settings.body_timeout_s
WebWorker.body_limit_bytes = _settings.body_limit_bytes

# One process: the queue, the limits and the engine's slots are counted in one place.
workers = 1
threads = _settings.threads_of_server
worker_connections = 1000
backlog = 512
# Longer than the pause between two requests of a client that keeps its connection, shorter than proxies keep theirs.
keepalive = 15
# The worker's main loop only polls; if it gives no sign of life it hangs.
timeout = 60
# Answers on a CPU take long: at SIGTERM they may finish, until the drain's limit cancels them; a little beyond it.
graceful_timeout = int(_settings.drain_limit_s) + 15
# gunicorn's own control socket would go to the home directory, which a hardened unit does not have.
control_socket_disable = True
# Requests are logged by the application, one JSON line each.
accesslog = None
errorlog = "-"
loglevel = "warning"
proc_name = "mini-llm"
# No proxy is trusted until one is named.
forwarded_allow_ips = ""
limit_request_line = 4094
limit_request_fields = 64
limit_request_field_size = 8190


def on_starting(server: Any) -> None:
    """Arguments and GUNICORN_CMD_ARGS come after this file: what the service stands on may not be changed by them."""
    given = server.cfg
    if (given.bind, given.workers, given.worker_class) != ([bind], workers, WebWorker):
        sys.exit("error: bind, workers and worker_class are not for gunicorn's arguments; use LLM_HOST and LLM_PORT")


def post_worker_init(worker: WebWorker) -> None:
    from service.wsgi import refuse, runtime

    worker.on_stopping = runtime.stop_gently
    worker.on_bad_request = runtime.metrics.count_bad_request
    try:
        runtime.start()
    except ServiceError as refusal:
        refuse(refusal)
    # A collection looks at all that a large body holds, and for each 700 lists of it there would be one: four fifths of
    # the time that it is parsed in. What is there by now stays, so none looks at it again.
    gc.freeze()
    gc.set_threshold(200_000)


def worker_exit(server: object, worker: WebWorker) -> None:
    loaded = sys.modules.get("service.wsgi")
    if loaded is not None:  # otherwise it could not be made, and has said so
        loaded.runtime.stop()

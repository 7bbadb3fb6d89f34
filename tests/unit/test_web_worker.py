"""What the web worker adds to gunicorn's, where no socket is needed to see it."""

import signal
from types import SimpleNamespace

from service.web_worker import WebWorker


def test_a_second_stop_signal_does_not_come_back_for_locks_that_are_held() -> None:
    """It arrives in the same thread, in the middle of the work on the first."""
    worker = WebWorker.__new__(WebWorker)
    worker.alive, worker._exiting = True, False
    worker.method_queue = SimpleNamespace(defer=lambda call: None)  # what wakes the main loop
    stopped: list[bool] = []

    def stop() -> None:
        stopped.append(worker.alive)
        worker.handle_exit(signal.SIGTERM, None)

    worker.on_stopping = stop
    worker.handle_exit(signal.SIGTERM, None)
    assert stopped == [True]
    assert worker.alive is False

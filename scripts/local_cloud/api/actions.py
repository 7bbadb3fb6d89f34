"""Owns actions: their documents, the threads that do their work, and the locks that they hold meanwhile."""

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.local_cloud.api.clock import render_now
from scripts.local_cloud.api.errors import Locked
from scripts.local_cloud.api.faults import ActionFault, take_action_fault
from scripts.local_cloud.machine_interface import MachineFailed
from scripts.local_cloud.store import Store

Document = dict[str, Any]
Resource = tuple[str, int]  # its type and its id, such as ("server", 42)

_log = logging.getLogger(__name__)
_STUCK_POLL_S = 0.1
_WRITE_AGAIN_S = 1.0
_INTERRUPTED = "the local cloud was stopped while this action ran"


class ActionFailed(Exception):
    """The action cannot be done; the message is one line for people."""


class _Injected(ActionFailed):
    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class _Closing(Exception):
    """The cloud is stopping: the action stays unfinished, and the next start ends it."""


def _do_nothing() -> None:
    return None


@dataclass(frozen=True)
class Step:
    """One action to come: ``work`` does it; ``undo`` brings about the documented end if it fails or never begins."""

    command: str
    resources: tuple[Resource, ...]
    work: Callable[[], object]
    undo: Callable[[], object] = _do_nothing


@dataclass(frozen=True)
class _Begun:
    action_id: int
    step: Step
    fault: ActionFault | None


class Actions:
    """All actions of the project; at most ``workers`` of them work at the same time."""

    def __init__(self, store: Store, workers: int = 8):
        self._store = store
        self._slots = threading.BoundedSemaphore(workers)
        self._closing = threading.Event()
        self._threads: set[threading.Thread] = set()
        # Both are guarded by the store's lock, so that checks and changes of state go together with locks.
        self._held: set[Resource] = set()
        self._used: Counter[Resource] = Counter()

    def is_locked(self, resource: Resource) -> bool:
        """Whether an action that changes this resource is running."""
        return resource in self._held

    def require_free(self, *resources: Resource) -> None:
        """Raises Locked if an action holds or uses one of them."""
        with self._store.transaction():
            for kind, resource_id in resources:
                if (kind, resource_id) in self._held or self._used[kind, resource_id]:
                    what = kind.replace("_", " ")
                    raise Locked(f"{what} with ID {resource_id} is locked: another action is running")

    def begin(
        self, steps: Sequence[Step], hold: Sequence[Resource] = (), use: Sequence[Resource] = ()
    ) -> list[Document]:
        """Starts work on the steps, one after the other, and returns their documents.

        ``hold`` are locked until the last has ended; ``use`` can be used by others too, but not held. Raises Locked.
        In a transaction the work starts when that is on the disk, and never if it is undone.
        """
        with self._store.transaction():
            self.require_free(*hold)
            for kind, resource_id in use:
                if (kind, resource_id) in self._held:
                    raise Locked(f"{kind} with ID {resource_id} is locked: another action is running")
            begun, documents = [], []
            for step in steps:
                document: Document = {
                    "id": self._store.next_id(),
                    "command": step.command,
                    "status": "running",
                    "progress": 0,
                    "started": render_now(),
                    "finished": None,
                    "resources": [{"id": resource_id, "type": kind} for kind, resource_id in step.resources],
                    "error": None,
                }
                self._store.put("action", document)
                documents.append(document)
                begun.append(_Begun(document["id"], step, take_action_fault(step.command)))
            self._held.update(hold)
            self._used.update(use)
            thread = threading.Thread(
                target=self._run,
                args=(begun, tuple(hold), tuple(use)),
                name=f"action-{documents[0]['id']}",
                daemon=True,
            )

            def undo() -> None:
                self._release(hold, use)
                self._threads.discard(thread)

            self._threads.add(thread)
            self._store.at_end(thread.start, undo)
        return documents

    def find(self, action_id: int) -> Document | None:
        """The document of an action, or None."""
        return self._store.find("action", action_id)

    def read_all(self, kind: str | None = None, resource_id: int | None = None) -> list[Document]:
        """All actions, or those of one kind of resource, or of one resource."""
        return [
            action
            for action in self._store.read_all("action")
            if kind is None
            or any(each["type"] == kind and resource_id in (None, each["id"]) for each in action["resources"])
        ]

    def end_interrupted(self) -> list[Document]:
        """Makes errors of the actions that were running when the cloud was last stopped, and returns them.

        Call it before anything else.
        """
        with self._store.transaction():
            ended = [action for action in self._store.read_all("action") if action["status"] == "running"]
            for action in ended:
                self._finish(action["id"], {"code": "action_failed", "message": _INTERRUPTED})
        return ended

    def close(self, timeout_s: float) -> bool:
        """Begins no more work and waits for what is being done; tells whether all of it ended in time."""
        self._closing.set()
        deadline = time.monotonic() + timeout_s
        with self._store.transaction():
            threads = list(self._threads)
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _finish(self, action_id: int, error: Document | None) -> None:
        status = "error" if error else "success"
        self._store.change("action", action_id, status=status, progress=100, finished=render_now(), error=error)

    def _meet(self, fault: ActionFault | None) -> None:
        if fault is None:
            return
        if fault.fault.kind == "action_failed":
            raise _Injected(fault.fault.code, fault.fault.message)
        if fault.fault.kind == "action_lasts":
            self._closing.wait(fault.fault.seconds)
            return
        while not fault.released.wait(_STUCK_POLL_S) and not self._closing.is_set():
            pass

    def _do(self, begun: _Begun) -> Document | None:
        """Does one step; returns its error, or None."""
        try:
            self._meet(begun.fault)
            with self._slots:
                if self._closing.is_set():
                    raise _Closing
                begun.step.work()
        except _Injected as error:
            return {"code": error.code, "message": str(error)}
        except (MachineFailed, ActionFailed) as error:
            if self._closing.is_set():  # machines refuse what comes after their end
                raise _Closing from error
            return {"code": "action_failed", "message": str(error)}
        except sqlite3.Error as error:
            return {"code": "action_failed", "message": f"the state cannot be written: {error}"}
        except _Closing:
            raise
        except Exception:
            _log.exception("action %d (%s) broke", begun.action_id, begun.step.command)
            return {"code": "server_error", "message": "the local cloud made a mistake; its log says more"}
        return None

    def _end(self, begun: _Begun) -> None:
        try:
            begun.step.undo()
        except (MachineFailed, sqlite3.Error) as error:
            _log.warning("after action %d (%s) failed: %s", begun.action_id, begun.step.command, error)
        except Exception:
            _log.exception("after action %d (%s) failed", begun.action_id, begun.step.command)

    def _run(self, steps: Sequence[_Begun], hold: Sequence[Resource], use: Sequence[Resource]) -> None:
        try:
            error: Document | None = None
            for begun in steps:
                error = error or self._do(begun)
                if error:
                    self._end(begun)
                self._write_end(begun, error, *((hold, use) if begun is steps[-1] else ((), ())))
        except _Closing:
            pass
        finally:
            with self._store.hold():
                self._threads.discard(threading.current_thread())

    def _write_end(
        self, begun: _Begun, error: Document | None, hold: Sequence[Resource], use: Sequence[Resource]
    ) -> None:
        """Writes down that an action has ended, as soon as the disk has room for that, and releases its locks."""
        said = False
        while True:
            try:
                with self._store.hold():  # whoever sees the last one ended can begin the next at once
                    self._finish(begun.action_id, error)
                    self._release(hold, use)
                return
            except sqlite3.Error as failure:
                if not said:
                    _log.error("the end of action %d cannot be written down yet: %s", begun.action_id, failure)
                said = True
            if self._closing.wait(_WRITE_AGAIN_S):
                raise _Closing

    def _release(self, hold: Sequence[Resource], use: Sequence[Resource]) -> None:
        self._held.difference_update(hold)
        self._used.subtract(use)

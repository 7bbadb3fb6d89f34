"""Owns the calls of the Hetzner Cloud API: which of them are tried again, and how a result is found whose answer was
lost.

A call is tried again with growing, random pauses on what passes by itself, also `locked`, which hcloud for Python
leaves to its callers. Whatever makes something has a name that is unique in the project, so that a second try finds
the first one's result instead of making another.
"""

import logging
import os
import random
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import requests
from hcloud import APIException, Client
from hcloud.actions import BoundAction
from hcloud.floating_ips import BoundFloatingIP
from hcloud.images import BoundImage, Image
from hcloud.locations import Location
from hcloud.primary_ips import BoundPrimaryIP
from hcloud.server_types import BoundServerType, ServerType
from hcloud.servers import BoundServer
from hcloud.ssh_keys import BoundSSHKey
from hcloud.volumes import BoundVolume
from hcloud.zones import Zone, ZoneRRSet
from hcloud.zones.domain import ZoneRRSetType

from scripts.bake.answers import given
from scripts.bake.errors import BakeError, CloudFailed, ImageGone, Refused, Unavailable
from scripts.bake.snapshots import SELECTOR, Snapshot, read_snapshot, with_labels

T = TypeVar("T")
_log = logging.getLogger(__name__)

# https://docs.hetzner.cloud/reference/cloud#errors; numbers are of answers that a proxy on the way made up.
PASSING = {
    *("conflict", "locked", "rate_limit_exceeded", "bad_gateway", "timeout", "unavailable", "server_error"),
    *("service_error", "maintenance", 500, 502, 503, 504),
    "resource_in_use",  # by a server that was just deleted, of which a firewall hears a little later
}
NO_ROOM = {"resource_unavailable", "placement_error"}
_CALL_TIMEOUT_S = (10.0, 60.0)
_PATIENCE_S = 300.0  # for one call that fails again and again
LOCKED_PATIENCE_S = 3600.0  # for a thing that an action works on, which may be the copy of a large disk
_IN_USE_PATIENCE_S = 60.0  # for a thing that something else holds, which may stay so
_FIRST_PATIENCE_S = 15.0  # as long as nothing was ever heard of this cloud: its address may be wrong
_SILENCE_S = 5.0  # after which a person is told what is being waited for
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.2, 3.0  # at an action; the API allows one request a second in the long run
_NO_API = "look at HCLOUD_ENDPOINT: is it an API of Hetzner Cloud, with its version, as in https://…/v1?"
_HINTS = {
    "unauthorized": "the token is wrong or was deleted: make one with read and write access in the project's settings",
    "token_readonly": "the token may only read: make one with read and write access",
    "forbidden": "the token may not do this: make one with read and write access",
    "404": _NO_API,
    "resource_limit_exceeded": "the project's limit is reached: delete what is not needed, or ask Hetzner",
}


def pauses() -> Iterator[float]:
    """Seconds to wait before each further try: growing, and random, so that many who failed together part."""
    pause_s = 0.5
    while True:
        yield random.uniform(pause_s / 2, pause_s)  # noqa: S311 - no secret
        pause_s = min(pause_s * 2, 30.0)


@dataclass(frozen=True)
class Access:
    """Where the API is and who may use it; the token is shown nowhere."""

    endpoint: str
    token: str

    def __repr__(self) -> str:
        return f"Access({self.endpoint!r}, …)"


def find_access(environment: dict[str, str] | None = None) -> Access:
    """From HCLOUD_TOKEN, or the active context of the hcloud command's own file. Raises Refused."""
    told = dict(os.environ) if environment is None else environment
    endpoint = told.get("HCLOUD_ENDPOINT") or "https://api.hetzner.cloud/v1"
    if token := told.get("HCLOUD_TOKEN", "").strip():
        return Access(endpoint.rstrip("/"), _check_token(token, "HCLOUD_TOKEN"))
    path = Path(told.get("HCLOUD_CONFIG") or Path(told.get("HOME", "~")).expanduser() / ".config/hcloud/cli.toml")
    hint = "set HCLOUD_TOKEN, or make a context: hcloud context create NAME; no account: make cloud CLOUD=--old-clients"
    try:
        known = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise Refused("there is no token for the cloud", hint) from None
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read", hint) from error
    name = told.get("HCLOUD_CONTEXT") or known.get("active_context")
    for context in known.get("contexts", []):
        if context.get("name") == name and context.get("token"):
            return Access(
                str(told.get("HCLOUD_ENDPOINT") or context.get("endpoint") or endpoint).rstrip("/"),
                _check_token(str(context["token"]), str(path)),
            )
    raise Refused(f"{path} has no active context with a token", hint)


def _check_token(token: str, source: str) -> str:
    """The token, if it can stand in a call's header at all; nothing of it is told. Raises Refused."""
    if not token.isascii() or not token.isprintable() or " " in token:
        raise Refused(f"{source} holds no token", "it has letters and digits alone, 64 of them at Hetzner")
    return token


class Cloud:
    """One project at the cloud; every method returns when what it asks for is done, or raises a BakeError."""

    def __init__(self, access: Access, patience_s: float = _PATIENCE_S):
        self.access = access
        self._patience_s, self._reached = patience_s, False
        self.unanswered = False  # a server was asked for, and nobody has said what became of that
        # Its own limit of polls is too low for a snapshot of gigabytes, so actions are waited for here.
        self.client = Client(
            access.token, access.endpoint, application_name="mini-llm-bake", timeout=_CALL_TIMEOUT_S, poll_max_retries=0
        )

        # It would try again by itself, with minutes of pauses of which nobody is told.
        self.client._client._retry_max_retries = 0

    def attempt(self, what: str, call: Callable[[], T], found: Callable[[], T | None] | None = None) -> T:
        """The call's result, tried again as long as it fails in passing.

        ``found`` looks for the result of a call whose answer was lost. Raises CloudFailed, and APIException of what
        the caller has to tell apart itself: not_found, invalid_input, uniqueness_error, and that there is no room.
        """
        begin_s = time.monotonic()
        end_s = begin_s + (self._patience_s if self._reached else min(self._patience_s, _FIRST_PATIENCE_S))
        pauses_s = pauses()
        while True:
            try:
                result = call()
                self._reached = True
                return result
            except APIException as error:
                self._reached = True
                if (
                    error.code == "uniqueness_error"
                    and found is not None
                    and (made := self._look(what, found)) is not None
                ):
                    return made
                given_s = end_s
                if error.code == "locked":
                    given_s = begin_s + max(LOCKED_PATIENCE_S, self._patience_s)
                elif error.code == "resource_in_use":
                    given_s = min(end_s, begin_s + _IN_USE_PATIENCE_S)
                if error.code not in PASSING or time.monotonic() > given_s:
                    if error.code in {"not_found", "invalid_input", "uniqueness_error", *NO_ROOM}:
                        raise
                    raise _describe(what, error) from error
                reason = str(error)
            except (ValueError, KeyError, TypeError) as error:  # requests' own of wrong addresses are such, too
                raise CloudFailed(
                    f"{what}: what {self.access.endpoint} says makes no sense ({type(error).__name__})",
                    _NO_API,
                ) from error
            except requests.RequestException as error:
                if time.monotonic() > end_s:
                    raise CloudFailed(
                        f"{what}: {self.access.endpoint} cannot be reached ({type(error).__name__})",
                        "look after the network, then run the same command again: it goes on where it can",
                    ) from error
                reason = type(error).__name__
            told = _log.warning if time.monotonic() - begin_s > _SILENCE_S else _log.info
            told("%s: %s; tried again", what, reason)
            time.sleep(next(pauses_s))
            if found is not None and (made := self._look(what, found)) is not None:
                return made

    def _ask(self, what: str, call: Callable[[], T], found: Callable[[], T | None] | None = None) -> T:
        """As `attempt`, for calls whose callers tell no refusal apart."""
        try:
            return self.attempt(what, call, found)
        except APIException as error:
            described = _describe(what, error)
            described.hint = described.hint or (_NO_API if error.code == "not_found" else "")
            raise described from error

    def _look(self, what: str, found: Callable[[], T | None]) -> T | None:
        return self.attempt(f"{what}, looked for", found)

    def wait(self, what: str, actions: Iterable[BoundAction], end_s: float) -> None:
        """Waits for actions, until ``end_s`` of Unix time. Raises CloudFailed, ActionFailed with the reason."""
        for each in actions:
            action, pause_s = each, _FIRST_LOOK_S
            while action.status == BoundAction.STATUS_RUNNING:
                if time.time() > end_s:
                    raise CloudFailed(
                        f"{what}: action {action.id} did not end in time", "look at it in Hetzner's console"
                    )
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.3, _LONGEST_LOOK_S)
                action = self.attempt(what, partial(self.client.actions.get_by_id, given(action.id)))
            if action.status == BoundAction.STATUS_ERROR:
                told: Mapping[str, object] = action.error or {}
                raise ActionFailed(
                    f"{what}: {told.get('message')} ({told.get('code')}, action {action.id})", str(told.get("code"))
                )

    # What is there.

    def snapshots(self) -> list[Snapshot]:
        """Every snapshot of this product."""
        images = self._ask(
            "list the snapshots", lambda: self.client.images.get_all(type=["snapshot"], label_selector=SELECTOR)
        )
        return [read_snapshot(each) for each in images]

    def snapshot(self, number: int) -> Snapshot | None:
        """One of them, fresh; None if it is gone, or is nothing of this product."""
        try:
            image = self.attempt(f"look at snapshot {number}", lambda: self.client.images.get_by_id(number))
        except APIException as error:
            if error.code != "not_found":
                raise _describe(f"look at snapshot {number}", error) from error
            return None
        own = image.type == "snapshot" and (image.labels or {}).get("product") == "mini-llm"
        return read_snapshot(image) if own else None

    def servers(self) -> list[BoundServer]:
        """Every server of the project, others' too."""
        return self._ask("list the servers", self.client.servers.get_all)

    def ssh_keys(self) -> list[BoundSSHKey]:
        """Every SSH key of the project."""
        return self._ask("list the SSH keys", self.client.ssh_keys.get_all)

    def labelled(self, collection: str, selector: str) -> list[Any]:
        """What has some labels, of a collection that the client knows by this name."""
        listed = getattr(self.client, collection)
        return list(self._ask(f"list the {collection}", lambda: listed.get_all(label_selector=selector)))

    def records(self, selector: str) -> list[tuple[str, str, str]]:
        """Zone, name and type of each record set with some labels, in all zones of the account."""

        def listed() -> list[tuple[str, str, str]]:
            zones = self.client.zones
            return [
                (given(zone.name), given(each.name), given(each.type))
                for zone in zones.get_all()
                for each in zones.get_rrset_all(zone, label_selector=selector)
            ]

        return self._ask("list the records", listed)

    def server_types(self) -> list[BoundServerType]:
        """What is on offer."""
        return self._ask("list the server types", self.client.server_types.get_all)

    def floating_ips(self) -> list[BoundFloatingIP]:
        """Every floating IP of the project."""
        return self._ask("list the floating IPs", self.client.floating_ips.get_all)

    def primary_ips(self) -> list[BoundPrimaryIP]:
        """Every primary IP of the project; a server's own addresses are such."""
        return self._ask("list the primary IPs", self.client.primary_ips.get_all)

    def volumes(self) -> list[BoundVolume]:
        """Every volume of the project."""
        return self._ask("list the volumes", self.client.volumes.get_all)

    def pricing(self) -> dict[str, Any]:
        """The price list, as ``GET /pricing`` has it."""
        answer = self._ask("look at the prices", lambda: self.client.request("GET", "/pricing"))
        return dict(answer["pricing"])

    # What is made and changed.

    def add_key(self, name: str, public_key: str, labels: dict[str, str]) -> BoundSSHKey:
        """An SSH key; the one of that name, if a try before has made it."""
        return self._ask(
            "add the SSH key",
            lambda: self.client.ssh_keys.create(name, public_key, labels=labels),
            lambda: self.client.ssh_keys.get_by_name(name),
        )

    def create_server(
        self,
        name: str,
        image: int,
        places: Iterable[tuple[str, str]],
        key: BoundSSHKey,
        user_data: str,
        labels: dict[str, str],
        end_s: float,
    ) -> BoundServer:
        """A server that was started, of the first (type, location) that has room.

        Raises Unavailable if none has, ImageGone if the snapshot was removed meanwhile.
        """
        tried = []
        for server_type, location in places:
            try:
                return self._create_server(name, image, server_type, location, key, user_data, labels, end_s)
            except (APIException, ActionFailed) as error:
                if error.code not in NO_ROOM:
                    if isinstance(error, ActionFailed):
                        raise
                    if self.snapshot(image) is None:
                        raise ImageGone(f"snapshot {image} is gone") from error
                    raise _describe(f"create {name}", error) from error
                _log.info("no room for %s at %s: %s", server_type, location, error)
                tried.append(f"{server_type} at {location}")
        raise Unavailable(
            f"there is no room for a server: {', '.join(tried)}",
            "name other locations or types (--location, --node-type), or try again later",
        )

    def _create_server(
        self,
        name: str,
        image: int,
        server_type: str,
        location: str,
        key: BoundSSHKey,
        user_data: str,
        labels: dict[str, str],
        end_s: float,
    ) -> BoundServer:
        what = f"create {name} ({server_type}, {location})"
        for _ in range(3):
            answered: list[BoundAction] = []

            def create(answered: list[BoundAction] = answered) -> BoundServer:
                made = self.client.servers.create(
                    name,
                    ServerType(name=server_type),
                    Image(id=image),
                    ssh_keys=[key],
                    user_data=user_data,
                    location=Location(name=location),
                    labels=labels,
                )
                answered.extend((made.action, *made.next_actions))
                return made.server

            self.unanswered = True
            try:
                server = self.attempt(what, create, lambda: self.client.servers.get_by_name(name))
            except (APIException, BakeError):
                self.unanswered = False
                raise
            self.unanswered = False
            number = given(server.id)
            try:
                self.wait(what, answered, end_s)
                if not answered:
                    self._wait_until_running(what, number, end_s)
                return self.attempt(what, partial(self.client.servers.get_by_id, number))
            except (ActionFailed, APIException) as error:
                if isinstance(error, APIException) and error.code != "not_found":
                    raise
                self.delete_server(server, end_s)
                if error.code in NO_ROOM:
                    raise
                _log.info("%s: %s; made anew", what, error)
        raise ActionFailed(f"{what}: it failed again and again", "")

    def _wait_until_running(self, what: str, number: int, end_s: float) -> None:
        """For a server whose answer was lost, and its actions with it."""
        while time.time() < end_s:
            server = self.attempt(what, lambda: self.client.servers.get_by_id(number))
            if server.status == "running":
                return
            if server.status == "off":
                action = self.attempt(what, server.power_on)
                self.wait(what, [action], end_s)
                return
            time.sleep(1)
        raise CloudFailed(f"{what}: it does not start")

    def delete_server(self, server: BoundServer, end_s: float) -> None:
        """A server that is gone; it may be so already."""
        self._delete(f"delete server {server.name}", server.delete, end_s)

    def delete_key(self, key: BoundSSHKey) -> None:
        """An SSH key that is gone; it may be so already."""
        self._delete(f"delete SSH key {key.name}", key.delete, 0)

    def delete_snapshot(self, snapshot: Snapshot) -> None:
        """A snapshot that is gone; it may be so already."""
        self._delete(f"delete snapshot {snapshot.id}", lambda: self.client.images.delete(Image(id=snapshot.id)), 0)

    def delete_labelled(self, collection: str, number: int, name: str, end_s: float) -> None:
        """One of them that is gone; it may be so already."""
        listed = getattr(self.client, collection)

        def delete() -> BoundAction | bool:
            answer: BoundAction | bool = listed.get_by_id(number).delete()
            return answer

        self._delete(f"delete {name} of the {collection}", delete, end_s)

    def delete_record(self, zone: str, name: str, of_type: str, end_s: float) -> None:
        """A record set that is gone; it may be so already."""

        def delete() -> BoundAction:
            found = ZoneRRSet(zone=Zone(name=zone), name=name, type=cast("ZoneRRSetType", of_type))
            return self.client.zones.delete_rrset(found).action

        self._delete(f"delete the record {name}/{of_type} of {zone}", delete, end_s)

    def _delete(self, what: str, call: Callable[[], BoundAction | bool], end_s: float) -> None:
        for pause_s, last_try in zip(pauses(), (False, False, False, True), strict=False):
            try:
                result = self.attempt(what, call)
                if isinstance(result, BoundAction):
                    self.wait(what, [result], end_s)
                return
            except ActionFailed:
                if last_try:
                    raise
                time.sleep(pause_s)
            except APIException as error:
                if error.code == "not_found":
                    return
                raise _describe(what, error) from error

    def relabel(self, snapshot: Snapshot, /, *without: str, **more: str) -> Snapshot:
        """The snapshot with other labels, in one call; the labels are read anew right before. Raises ImageGone."""
        what = f"label snapshot {snapshot.id}"

        def write() -> BoundImage:
            now = read_snapshot(self.client.images.get_by_id(snapshot.id))
            return self.client.images.update(Image(id=snapshot.id), labels=with_labels(now, *without, **more))

        try:
            return read_snapshot(self.attempt(what, write))
        except APIException as error:
            if error.code == "not_found":
                raise ImageGone(f"snapshot {snapshot.id} is gone: somebody else has removed it") from error
            raise _describe(what, error) from error


class ActionFailed(CloudFailed):
    """An action that the API took on ended in an error, which has a ``code`` as a refusal does."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


def describe_code(code: str) -> str:
    """What to do about an error's code, as far as there is more to say than the cloud does."""
    return _HINTS.get(code, "")


def _describe(what: str, error: APIException) -> BakeError:
    """An answer that ends a verb, with what Hetzner's support asks for."""
    correlation = f", correlation id {error.correlation_id}" if error.correlation_id else ""
    return CloudFailed(f"{what}: {error.message} ({error.code}{correlation})", describe_code(str(error.code)))

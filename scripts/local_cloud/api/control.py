"""Owns the paths that are the local cloud's own: the fault plan, who is cut off, and the record of calls."""

import json

import falcon

from scripts.local_cloud.api.bodies import Fields, is_hostname, read_object
from scripts.local_cloud.api.errors import InvalidInput
from scripts.local_cloud.api.faults import Faults
from scripts.local_cloud.api.life import Life

PREFIX = "/_local"


class _Plan:
    def __init__(self, faults: Faults):
        self._faults = faults

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = self._faults.plan

    def on_put(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._faults.replace(read_object(req))
        resp.media = self._faults.plan

    def on_delete(self, req: falcon.Request, resp: falcon.Response) -> None:
        self._faults.replace({"faults": []})
        resp.status = falcon.HTTP_204


class _Calls:
    def __init__(self, faults: Faults):
        self._faults = faults

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        after = req.get_param("after") or "0"
        if not (after.isascii() and after.isdigit() and len(after) < 17):
            raise InvalidInput({"after": ["must be the number of a call"]})
        resp.text = json.dumps({"calls": self._faults.read_calls(int(after))})
        resp.content_type = falcon.MEDIA_JSON


class _Network:
    def __init__(self, life: Life):
        self._life = life

    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = {"cut_off": list(self._life.cut_names)}

    def on_put(self, req: falcon.Request, resp: falcon.Response) -> None:
        fields = Fields(read_object(req))
        fields.allow_only(["cut_off"])
        names = fields.items("cut_off")
        known = all(isinstance(name, str) and (name == "*" or is_hostname(name)) for name in names)
        if not fields.has("cut_off") or not known:
            fields.blame("cut_off", "must be a list of servers' names, or * for all")
        fields.check()
        self._life.cut_off(names)
        self.on_get(req, resp)


def add_routes(app: falcon.App[falcon.Request, falcon.Response], faults: Faults, life: Life) -> None:
    """Adds ``/_local/faults`` (GET, PUT, DELETE), ``/_local/network`` (GET, PUT) and ``/_local/calls`` (GET)."""
    app.add_route(f"{PREFIX}/network", _Network(life))
    app.add_route(f"{PREFIX}/faults", _Plan(faults))
    app.add_route(f"{PREFIX}/calls", _Calls(faults))

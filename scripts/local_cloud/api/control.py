"""Owns the paths that are the local cloud's own: the fault plan and the record of calls."""

import json

import falcon

from scripts.local_cloud.api.bodies import read_object
from scripts.local_cloud.api.errors import InvalidInput
from scripts.local_cloud.api.faults import Faults

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


def add_routes(app: falcon.App, faults: Faults) -> None:
    """Adds ``GET``, ``PUT``, ``DELETE /_local/faults`` and ``GET /_local/calls``."""
    app.add_route(f"{PREFIX}/faults", _Plan(faults))
    app.add_route(f"{PREFIX}/calls", _Calls(faults))

"""Owns lists: filters and sorting that all of them share, pages, and the links between those."""

from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlencode

import falcon

from scripts.local_cloud.api import labels
from scripts.local_cloud.api.errors import InvalidInput

Document = dict[str, Any]

_PER_PAGE_DEFAULT = 25
_PER_PAGE_LIMIT = 50
_LARGEST_PAGE = 2**53


def _read_count(req: falcon.Request, name: str, default: int, limit: int) -> int:
    raw = req.get_param(name)
    if raw is None:
        return default
    if not (raw.isascii() and raw.isdigit() and len(raw) < 20 and 1 <= int(raw) <= limit):
        raise InvalidInput({name: [f"must be a number from 1 to {limit}"]})
    return int(raw)


def filter_equal(req: falcon.Request, documents: Iterable[Document], name: str) -> list[Document]:
    """The documents whose field ``name`` is the one that the query asks for; all of them if it asks for none."""
    wanted = req.get_param(name)
    return [document for document in documents if not wanted or document[name] == wanted]


def filter_any(
    req: falcon.Request, documents: Iterable[Document], name: str, allowed: Iterable[str] | None = None
) -> list[Document]:
    """The documents whose field ``name`` is among those that the query names, repeated; raises InvalidInput."""
    wanted = req.get_param_as_list(name)
    if not wanted:
        return list(documents)
    if allowed is not None:
        known = list(allowed)
        if unknown := [value for value in wanted if value not in known]:
            raise InvalidInput({name: [f"{unknown[0]!r} is not one of: {', '.join(known)}"]})
    return [document for document in documents if str(document[name]) in wanted]


def filter_labels(req: falcon.Request, documents: Iterable[Document]) -> list[Document]:
    """The documents that the query's label_selector chooses; raises InvalidInput."""
    try:
        chosen = labels.parse_selector(req.get_param("label_selector") or "")
    except labels.SelectorInvalid as error:
        raise InvalidInput({"label_selector": [str(error)]}) from error
    return [document for document in documents if chosen(document["labels"])]


def _sort_key(field: str) -> Callable[[Document], tuple[bool, Any]]:
    return lambda document: (document[field] is not None, document[field])


def _sort(req: falcon.Request, documents: list[Document], allowed: Iterable[str]) -> list[Document]:
    """Sorted by the query's ``sort``, the first one counting most; by id if there is none; raises InvalidInput."""
    fields = list(allowed)
    ordered = sorted(documents, key=_sort_key("id"))
    # Sorting is stable: the last wish is done first.
    for wish in reversed(req.get_param_as_list("sort") or []):
        field, _, direction = wish.partition(":")
        if field not in fields or direction not in ("", "asc", "desc"):
            raise InvalidInput({"sort": [f"{wish!r} is not one of {', '.join(fields)}, with :asc or :desc or without"]})
        ordered.sort(key=_sort_key(field), reverse=direction == "desc")
    return ordered


def _render_link(req: falcon.Request, pages: dict[str, int | None]) -> str:
    links = []
    for relation, number in pages.items():
        if number is not None:
            query = {**req.params, "page": str(number)}
            links.append(f'<{req.prefix}{req.path}?{urlencode(query, doseq=True)}>; rel="{relation}"')
    return ", ".join(links)


def answer_list(
    req: falcon.Request,
    resp: falcon.Response,
    key: str,
    documents: list[Document],
    sort_by: Iterable[str] = ("id",),
    per_page_limit: int = _PER_PAGE_LIMIT,
) -> None:
    """Answers with one page of the documents under ``key``, sorted, with meta and Link; raises InvalidInput."""
    page = _read_count(req, "page", 1, _LARGEST_PAGE)
    per_page = _read_count(req, "per_page", _PER_PAGE_DEFAULT, per_page_limit)
    ordered = _sort(req, documents, sort_by)
    last = max(1, -(-len(ordered) // per_page))
    previous = min(page - 1, last) if page > 1 else None
    following = page + 1 if page < last else None
    resp.media = {
        key: ordered[(page - 1) * per_page : page * per_page],
        "meta": {
            "pagination": {
                "page": page,
                "per_page": per_page,
                "previous_page": previous,
                "next_page": following,
                "last_page": last,
                "total_entries": len(ordered),
            }
        },
    }
    links = {"first": 1 if previous else None, "prev": previous, "next": following, "last": last if following else None}
    if link := _render_link(req, links):
        resp.set_header("Link", link)

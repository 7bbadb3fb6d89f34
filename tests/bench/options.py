"""Owns the options that benches have in common: how often each figure is measured, and what is left out."""

import argparse
from collections.abc import Sequence

from tests.bench.model import MODELS


def make_parser(
    module: str, document: str | None, *, rounds: int | None = None, parts: Sequence[str] = (), model: str | None = None
) -> argparse.ArgumentParser:
    """A parser of ``--rounds`` and ``--model``, where they have a default, and of ``--without``, if there are parts."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(document or "").partition("\n")[0])
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=_count, default=rounds, help="how often each figure is measured (default: %(default)s)"
        )
    if parts:
        parser.add_argument("--without", nargs="+", default=[], choices=parts, help="parts that are not measured")
    if model is not None:
        parser.add_argument(
            "--model", choices=MODELS, default=model, help="random weights in this shape (default: %(default)s)"
        )
    return parser


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(word)

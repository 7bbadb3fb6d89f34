"""Owns the judgement whether an answer of the starter model is right."""

import re
from collections.abc import Sequence

# Four words that come twice in an answer this short mean that the model goes in circles.
REPEATED_WORDS = 4


def find_faults(
    response: str, required: Sequence[Sequence[str]], forbidden: Sequence[str], *, ended: bool
) -> list[str]:
    """Return what is wrong with the response; an empty list means that it is right.

    required holds one list of alternatives for each fact: one of them must stand in the response, in any case.
    forbidden holds texts of which none may stand there. ended tells whether the model ended the answer by itself.
    """
    text = response.lower()
    faults = [f"says none of {alternatives}" for alternatives in required if not _holds(text, alternatives)]
    faults += [f"says {wrong!r}" for wrong in forbidden if wrong.lower() in text]
    if not ended:
        faults.append("did not end by itself")
    if not is_legible(response):
        faults.append("is not legible")
    if repeats_itself(response):
        faults.append("repeats itself")
    return faults


def is_legible(response: str) -> bool:
    """Tell whether the response is one line of printable ASCII that begins with a word and ends like a sentence."""
    return bool(re.fullmatch(r"[A-Za-z0-9/~][ -~]*[.!?']", response))


def repeats_itself(response: str) -> bool:
    """Tell whether the response says REPEATED_WORDS words in a row twice."""
    words = re.findall(r"[^\s.,:;!?]+", response.lower())
    runs = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    return len(runs) != len(set(runs))


def _holds(text: str, alternatives: Sequence[str]) -> bool:
    return any(alternative.lower() in text for alternative in alternatives)

"""Owns stop strings: text that could be the beginning of one is held back until it is clear that it is none."""

from collections.abc import Sequence


class StopFilter:
    """Cuts a stream of text before the first stop string; no piece of a stop string is ever let through."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Takes the next text and returns what may be sent now; ``stopped`` tells whether a stop string was met."""
        if self.stopped or not text:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            ready, self._held = self._held[: min(places)], ""
            return ready
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready

    def flush(self) -> str:
        """What was held back, once no more text can come."""
        ready, self._held = self._held, ""
        return "" if self.stopped else ready

    def _overlap(self, stop: str) -> int:
        """Characters at the end of the held text with which ``stop`` begins."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

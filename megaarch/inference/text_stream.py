"""Tokens to text as they come: whole characters only, up to a stop string."""

from collections.abc import Iterable, Sequence

from megaarch.ingest.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not one yet


class TextStream:
    """The text of an answer. before: tokens that it continues, whose text it leaves out. stops: texts
    that end it and do not belong to it; `stopped` says that one came."""

    def __init__(self, tokenizer: Tokenizer, before: Iterable[int] = (), stops: Sequence[str] = ()):
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids = [int(token) for token in before][-8:]
        self.sent = len(tokenizer.decode(self.ids))  # characters of the window's text
        self.fresh = len(self.ids)  # where the tokens begin whose text may change yet
        self.held = ""  # text that may be the beginning of a stop
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        self.ids.append(int(token))
        text = self.tokenizer.decode(self.ids)
        end = max(len(text.rstrip(UNFINISHED)), self.sent)
        new, self.sent = text[self.sent : end], end
        if not text.endswith(UNFINISHED):
            # the window moves on: text that is certain and what came last
            self.ids, last = self.ids[self.fresh :], len(self.ids) - self.fresh
            self.fresh, self.sent = last, len(self.tokenizer.decode(self.ids))
        return self._up_to_stop(new)

    def finish(self) -> str:
        """Returns what is left at the end; bytes there that make no character are left out."""
        held, self.held = self.held, ""
        return held

    def _up_to_stop(self, new: str) -> str:
        text = self.held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0

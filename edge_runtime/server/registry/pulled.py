"""Names that clients give → entries of the store: what was pulled, whole, and can be loaded."""

from __future__ import annotations

from edge_runtime.errors import ModelFileError
from edge_runtime.store.library import Entry, Library
from edge_runtime.store.names import ALIASES, alias_meant, parse_source


class PulledModels:
    """The models of the store, by every name they go by. Names are compared without case."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def all(self) -> list[Entry]:
        """Every entry that is a model; neither checkpoints nor what is still being pulled."""
        return [entry for entry in self._library.entries() if _is_model(entry)]

    def find(self, name: str) -> Entry | None:
        """The pulled model that a name means."""
        return self._exactly(name) or self._exactly(self.spelled(name))

    def _exactly(self, name: str) -> Entry | None:
        try:
            source = parse_source(name)
            entry = self._library.find(source) if source is not None else None
        except ModelFileError:
            return None
        return entry if entry is not None and _is_model(entry) else None

    def spelled(self, name: str) -> str:
        """A name of something that can be pulled, in the case of an alias or of what was pulled already."""
        kind, colon, rest = name.partition(":")
        if colon and kind.lower() in ("hf", "ms", "ollama"):
            name = f"{kind.lower()}:{rest}"
        known = [*ALIASES]
        for entry in self.all():
            known += [entry.name, f"{entry.source.kind}:{entry.source.place}"]
        key = name.lower()
        for each in sorted(known, key=len, reverse=True):
            if key == each.lower():
                return each
            if key.startswith(each.lower() + ":"):
                return each + name[len(each) :]
        return alias_meant(name)


def _is_model(entry: Entry) -> bool:
    return entry.complete and entry.kind != "checkpoint"

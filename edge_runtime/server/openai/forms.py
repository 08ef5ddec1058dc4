"""A form with one file → the file's bytes as they arrive, and the other fields; memory is bounded.

python-multipart finds the parts. Its parser for whole forms keeps files in memory or in files of its own, so the one
for single events is used.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from edge_runtime.server.errors import RequestError

MAX_PARTS = 32
MAX_FIELD_BYTES = 4096
"""Of all fields' values together, besides the file."""
FILE = "file"


class Form:
    """One form, while it arrives.

    Parameters
    ----------
    content_type : header of the request.

    Raises
    ------
    RequestError
        When it is no form.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not 0 < len(boundary) <= 256:
            raise RequestError(
                "The body is no form; expected multipart/form-data with a boundary, and with the fields file and "
                "purpose."
            )
        self.fields: dict[str, str] = {}
        """Known once all chunks were taken."""
        self.filename = ""
        self.has_file = False
        self._values: dict[str, bytearray] = {}
        self._found: list[bytes] = []
        """Of the file, from the last piece."""
        self._n_parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header = [bytearray(), bytearray()]
        self._name: str | None = None
        """Of the part at hand."""
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begins,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_ends,
                "on_headers_finished": self._headers_end,
                "on_part_data": self._part_data,
                "on_end": self._ends,
            },
        )

    async def file(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Pieces of the file.

        Raises
        ------
        RequestError
            When the form is damaged, or has no file, or several.
        """
        try:
            async for piece in body:
                if piece:
                    self._parser.write(piece)
                for found in self._found:
                    yield found
                self._found.clear()
            self._parser.finalize()
        except FormParserError as error:
            raise RequestError(f"The form is damaged: {error}; send it again.") from None
        if not self._is_whole:
            raise RequestError("The form ends in the middle; send it again.")
        if not self.has_file:
            raise RequestError("The form has no file; expected a field with a file in it, called file.", FILE)
        self.fields = {name: value.decode("utf-8", "replace") for name, value in self._values.items()}

    # --- what the parser finds ---------------------------------------------------------------------------------

    def _part_begins(self) -> None:
        self._n_parts += 1
        if self._n_parts > MAX_PARTS:
            raise RequestError(f"The form has more than {MAX_PARTS} parts; expected file, purpose and expires_after.")
        self._headers.clear()

    def _header_ends(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._headers[name.lower()] = value
        self._header = [bytearray(), bytearray()]

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == FILE:
            if self.has_file:
                raise RequestError("The form has several files; expected one.", FILE)
            self.has_file = True
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        elif self._name in self._values:
            raise RequestError(
                f"The form has the field {self._name[:80]!r} twice; expected it once.", self._name[:80]
            )
        else:
            self._values[self._name] = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self._found.append(data[start:end])
            return
        assert self._name is not None
        self._values[self._name] += data[start:end]
        if sum(map(len, self._values.values())) > MAX_FIELD_BYTES:
            raise RequestError(f"The fields of the form have more than {MAX_FIELD_BYTES} bytes; expected short ones.")

    def _ends(self) -> None:
        self._is_whole = True

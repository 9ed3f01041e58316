"""Multipart forms (pictures, audio): forwarded as the bytes they are; only the text fields the proxy needs are read.

python-multipart does the parsing and bounds each part's headers; a form without its closing boundary, with too many
parts, or with a field of ours that stands twice is refused, so that no backend reads it otherwise than we did.
"""

from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from proxy.errors import InvalidRequest
from proxy.relay.heads import Head

_MOST_PARTS = 128
_LONGEST_VALUE = 512
_READ = frozenset({"model", "stream"})


@dataclass(frozen=True, slots=True)
class Form:
    """The head of a form, and where in its body the model's name stands (None without one)."""

    head: Head
    model_at: slice | None


def is_form(content_type: bytes) -> bool:
    return content_type.split(b";", 1)[0].strip().lower() == b"multipart/form-data"


def read_form(content_type: bytes, body: bytes) -> Form:
    """Read a form's head; raises InvalidRequest."""
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        message = "The Content-Type multipart/form-data needs a boundary."
        raise InvalidRequest(message, code="invalid_content_type")
    parts = _Parts(body)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type] # a plain dict of its callbacks
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InvalidRequest(f"The request body is not a valid form: {error}", code="invalid_form") from error
    if not parts.ended:
        raise InvalidRequest("The request body is not a whole form: its end is missing.", code="invalid_form")
    return Form(_head(parts.text("model"), parts.text("stream")), parts.values.get("model"))


def with_model(form: Form, body: bytes, model: str) -> bytes:
    """The form with another name of the model: nothing else of it changes."""
    at = form.model_at
    return body if at is None else body[: at.start] + model.encode() + body[at.stop :]


def _head(model: str | None, stream: str | None) -> Head:
    if stream is not None and stream.lower() not in {"true", "false", "1", "0", ""}:
        raise InvalidRequest("Invalid type for 'stream': expected true or false.", param="stream")
    return Head(model=model, stream=stream is not None and stream.lower() in {"true", "1"})


@dataclass(slots=True)
class _Parts:
    """Collects, while the parser runs, where the values of the text fields we read begin and end."""

    body: bytes
    values: dict[str, slice] = field(default_factory=dict)
    ended: bool = False
    _count: int = 0
    _header: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _reading: str | None = None

    def callbacks(self) -> dict[str, object]:
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "end")
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def text(self, name: str) -> str | None:
        at = self.values.get(name)
        if at is None:
            return None
        try:
            return self.body[at].decode()
        except UnicodeDecodeError as error:
            raise InvalidRequest(f"Invalid value for '{name}': it is not UTF-8.", param=name) from error

    def _part_begin(self) -> None:
        self._count += 1
        if self._count > _MOST_PARTS:
            raise InvalidRequest(f"The form has more than {_MOST_PARTS} parts.", code="invalid_form")
        self._header = self._value = self._disposition = b""
        self._reading = None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode("latin-1")
        if name not in _READ or b"filename" in options:
            return
        if name in self.values:
            raise InvalidRequest(f"The field '{name}' stands twice in the form.", param=name)
        self._reading = name
        self.values[name] = slice(0, 0)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._reading is None:
            return
        known = self.values[self._reading]
        # Another piece, or one that is not of the body itself, means what looked like a boundary within the value.
        if known.stop or data is not self.body or end - start > _LONGEST_VALUE:
            raise InvalidRequest(f"Invalid value for '{self._reading}'.", param=self._reading)
        self.values[self._reading] = slice(start, end)

    def _end(self) -> None:
        self.ended = True

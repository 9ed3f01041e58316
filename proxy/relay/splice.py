"""Small changes to JSON objects as bytes, so that what is only passed on is never rebuilt."""

import msgspec

_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode = msgspec.json.Encoder().encode


def is_object(body: bytes) -> bool:
    return body[:64].lstrip().startswith(b"{")


def append_member(body: bytes, name: bytes, value: bytes) -> bytes:
    """Add a last member to a JSON object that is known to be valid; a like-named member is replaced."""
    quoted = b'"' + name + b'"'
    if quoted in body:
        members = _decode_object(body)
        if name.decode() in members:
            return replace_members(body, {name.decode(): value})
    end = body.rstrip()[:-1]
    comma = b"" if end.rstrip().endswith(b"{") else b","
    return end + comma + quoted + b":" + value + b"}"


def replace_members(body: bytes, members: dict[str, bytes]) -> bytes:
    """Set members of a JSON object, the others unchanged to the byte."""
    decoded = _decode_object(body)
    decoded.update((name, msgspec.Raw(value)) for name, value in members.items())
    return _encode(decoded)


def nested(body: bytes, member: str) -> bytes | None:
    """A member of a JSON object as it stands; None where there is none."""
    value = _decode_object(body).get(member)
    return None if value is None else bytes(value)

"""Small changes to JSON objects leave everything else as it was."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proxy.relay import splice

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), VALUES)


@given(OBJECTS, st.sampled_from([None, 0, 2]))
def test_appending_a_member_adds_it_and_changes_nothing_else(document: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(document, indent=indent).encode() + b"\n"
    changed = json.loads(splice.append_member(body, b"energy", b'{"j":1}'))
    assert changed == {**document, "energy": {"j": 1}}


def test_a_backends_own_energy_gives_way_to_ours() -> None:
    assert json.loads(splice.append_member(b'{"energy":{"fake":9},"a":1}', b"energy", b"2")) == {"energy": 2, "a": 1}


@given(OBJECTS)
def test_replacing_members_keeps_the_others(document: dict[str, Any]) -> None:
    changed = splice.replace_members(json.dumps(document).encode(), {"model": b'"x"'})
    assert json.loads(changed) == {**document, "model": "x"}

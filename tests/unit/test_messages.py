"""What the processes tell each other directly."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.deliverable.messages import Recorded, Stored, StoredEvent
from synapse_sticky.seams.bounds import Bounds
from synapse_sticky.storage.rows import EventChange

numbers = st.integers(-(2**62), 2**62)
names = st.text(max_size=20)
writers = st.dictionaries(names, numbers, max_size=3)
stored = st.builds(
    Stored,
    names,
    numbers,
    st.lists(st.builds(StoredEvent, names, names, numbers, numbers), max_size=3),
)
recorded = st.builds(
    Recorded,
    numbers,
    numbers,
    st.builds(Bounds, numbers, numbers, numbers, writers, writers),
    st.lists(
        st.builds(
            EventChange,
            names,
            names,
            names,
            st.none() | numbers,
            numbers,
            numbers,
            st.booleans(),
            st.none() | names,
        ),
        max_size=3,
    ),
)


@given(stored | recorded)
def test_round_trip(message: Any) -> None:
    # C11
    text = message.encode()
    assert type(message).decode(text) == message
    # Synapse sends a message as a line.
    assert "\n" not in text


@pytest.mark.parametrize("kind", [Stored, Recorded])
@pytest.mark.parametrize("content", [None, 5, [], ["name"], ["name", 1, [[1]]], {}, [1, 2, 3, 4]])
def test_what_is_none(kind: Any, content: Any) -> None:
    # C11: of another version, perhaps
    with pytest.raises((ValueError, TypeError)):
        kind.decode(json.dumps(content))

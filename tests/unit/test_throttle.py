"""How many events of a server pass, how many are held, and in which order they follow."""

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from synapse_sticky.noticing.throttle import Key, Throttle, Verdict
from synapse_sticky.seams.rates import Limiter

KEYS: list[Key] = [("!a:example.org", "one.example.org"), ("!a:example.org", "two.example.org")]


class Tokens(Limiter):
    """Allows as many as there are tokens."""

    def __init__(self) -> None:
        self.left = dict.fromkeys(KEYS, 0)

    async def allows(self, key: object) -> bool:
        """Take a token, if one is left."""
        assert isinstance(key, tuple)
        if not self.left[key]:
            return False
        self.left[key] -= 1
        return True


steps = st.lists(
    st.tuples(st.sampled_from(["event", "token", "release"]), st.sampled_from(KEYS)), max_size=60
)


@given(steps, st.integers(0, 5), st.integers(1, 3))
def test_in_order_within_the_bound_and_nothing_lost(
    history: list[tuple[str, Key]], most: int, at_once: int
) -> None:
    # A1, A2
    limiter = Tokens()
    throttle = Throttle(limiter, most)
    held: dict[Key, list[int]] = {key: [] for key in KEYS}
    passed: dict[Key, list[int]] = {key: [] for key in KEYS}

    async def play() -> None:
        for number, (step, key) in enumerate(history):
            if step == "token":
                limiter.left[key] += 1
            elif step == "release":
                had = limiter.left[key]
                count = await throttle.take(key, at_once)
                # All that is allowed, not more than there is, nor than a slice has.
                assert count == min(had, len(held[key]), at_once)
                passed[key] += [held[key].pop(0) for _ in range(count)]
            else:
                verdict = await throttle.judge(*key)
                if verdict is Verdict.PASSES:
                    assert not held[key]
                    passed[key].append(number)
                elif verdict is Verdict.HELD:
                    held[key].append(number)
                else:
                    assert len(held[key]) == most
            assert set(throttle.keys) == {k for k in KEYS if held[k]}
            assert all(len(events) <= most for events in held.values())
            assert all(events == sorted(events) for events in passed.values())

    asyncio.run(play())


def test_without_a_limit_all_pass() -> None:
    # A2
    throttle = Throttle(None, 0)
    verdicts = [asyncio.run(throttle.judge(*KEYS[0])) for _ in range(50)]
    assert verdicts == [Verdict.PASSES] * 50
    # What was held under another configuration follows at once.
    throttle.load({KEYS[0]: 3})
    assert asyncio.run(throttle.take(KEYS[0], 10)) == 3
    assert throttle.keys == []

"""Clients that do anything in any order, beside a model of the events that they must have."""

import random
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import pytest

from harness.client import JsonDict
from harness.homeserver import Homeserver
from harness.wait import eventually
from tests.sliding import Answer, Connection, send_known, subscription, window
from tests.support import ids, is_recorded, sticky_in, timeline_in


@dataclass
class Kept:
    """The sticky events that a client keeps, with how often each has come.

    The client drops those of rooms that it does not know yet, as matrix-js-sdk 43 does, and
    forgets those of users whom it ignores.
    """

    sender_of: dict[str, str]
    has_window: bool
    rooms: dict[str, Counter[str]] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)

    def know(self, room_id: str) -> None:
        """Learn of a room."""
        self.rooms.setdefault(room_id, Counter())

    def may_come_again(self, chosen: Callable[[str], bool]) -> None:
        """Allow these events to come once more."""
        for events in self.rooms.values():
            for event_id in filter(chosen, events):
                events[event_id] = 0

    def take(self, room_id: str, section: list[str], timeline: list[str]) -> None:
        """Take the events that an answer brings of a room."""
        if room_id not in self.rooms:
            return
        events = self.rooms[room_id]
        self.repeated += [name for name in section if events[name] or name in timeline]
        # A timeline shows again what came in sections while its room was outside the window.
        if not self.has_window:
            self.repeated += [name for name in timeline if events[name]]
        events.update(name for name in section + timeline if name in self.sender_of)

    def forget(self, user_ids: Collection[str]) -> None:
        """Forget the events of these users."""
        for events in self.rooms.values():
            for event_id in [e for e in events if self.sender_of[e] in user_ids]:
                del events[event_id]


class Walk:
    """Two users who send in three rooms, and one who reads by Sliding Sync and by `/sync`."""

    def __init__(self, homeserver: Homeserver, seed: int) -> None:
        self.homeserver = homeserver
        self.chance = random.Random(seed)
        self.senders = [homeserver.register() for _ in range(2)]
        self.bob = homeserver.register()
        self.rooms = [self.senders[0].create_room(preset="public_chat") for _ in range(3)]
        for room_id in self.rooms:
            for client in (self.senders[1], self.bob):
                client.join(room_id)
        self.joined = set(self.rooms)
        self.sent: dict[str, set[str]] = {room_id: set() for room_id in self.rooms}
        self.sender_of: dict[str, str] = {}
        self.ignored: set[str] = set()
        self.timeline_limit = self.chance.choice([0, 1, 3])
        self.connection = Connection(self.bob, {"all": self.window(0)})
        self.sliding = Kept(self.sender_of, has_window=True)
        self.filter = {"room": {"timeline": {"limit": self.chance.choice([0, 1, 3])}}}
        self.token: str | None = None
        self.sync = Kept(self.sender_of, has_window=False)
        self.log: list[str] = []

    def window(self, first: int) -> JsonDict:
        """A list that shows one room, or none beyond the last."""
        return window(first=first, timeline_limit=self.timeline_limit)

    def step(self) -> None:
        """Do anything."""
        weights: dict[Callable[[], str], int] = {
            self.send: 8,
            self.send_plain: 3,
            self.scroll: 3,
            self.subscribe: 2,
            self.match_nothing: 1,
            self.ask: 6,
            self.lose_answer: 2,
            self.lose_pos: 1,
            self.sync_once: 5,
            self.lose_sync: 2,
            self.change_ignored: 3,
            self.leave_or_join: 2,
        }
        (action,) = self.chance.choices(list(weights), list(weights.values()))
        self.log.append(f"{action.__name__}: {action()}")

    def send(self) -> str:
        sender, room_id = self.chance.choice(self.senders), self.chance.choice(self.rooms)
        event_ids = send_known(sender, room_id, self.chance.choice([1, 1, 2, 4]))
        self.sender_of.update(dict.fromkeys(event_ids, sender.user_id))
        self.sent[room_id].update(event_ids)
        return f"{self.numbers(event_ids)} in {self.rooms.index(room_id)} by {sender.user_id}"

    def send_plain(self) -> str:
        return self.chance.choice(self.senders).send(self.chance.choice(self.rooms))

    def scroll(self) -> str:
        first = self.chance.randrange(4)
        self.connection.lists = {"all": self.window(first)}
        return str(first)

    def subscribe(self) -> str:
        shown = self.chance.sample(self.rooms, self.chance.randrange(2))
        self.connection.subscriptions = {r: subscription(self.timeline_limit) for r in shown}
        return str(list(map(self.rooms.index, shown)))

    def match_nothing(self) -> str:
        self.connection.lists = {}
        return "but subscriptions"

    def ask(self, limit: int | None = None) -> str:
        answer = self.connection.ask(limit=limit or self.chance.choice([1, 2, 100]))
        self.sliding.forget(self.ignored)
        for room_id in answer.initial:
            self.sliding.know(room_id)
            self.sliding.may_come_again(self.sliding.rooms[room_id].__contains__)
        return self.take_sliding(answer)

    def take_sliding(self, answer: Answer) -> str:
        return str(
            [
                self.take(self.sliding, room_id, answer.sticky(room_id), answer.timeline(room_id))
                for room_id in self.rooms
            ]
        )

    def take(self, kept: Kept, room_id: str, section: list[str], timeline: list[str]) -> str:
        kept.take(room_id, section, timeline)
        return f"{self.numbers(section)}+{self.numbers(timeline)}"

    def lose_answer(self) -> str:
        return str(self.connection.peek(limit=self.chance.choice([1, 2, 100])).next_batch)

    def lose_pos(self) -> str:
        begin = self.chance.choice([self.connection.anew, self.connection.without_pos])
        self.connection = begin()
        return begin.__name__

    def sync_once(self) -> str:
        answer = self.bob.sync(self.token, filter=self.filter)
        self.token = answer["next_batch"]
        self.sync.forget(self.ignored)
        taken = []
        for room_id in answer.get("rooms", {}).get("join", {}):
            self.sync.know(room_id)
            section, timeline = ids(sticky_in(answer, room_id)), ids(timeline_in(answer, room_id))
            taken.append(
                (self.rooms.index(room_id), self.take(self.sync, room_id, section, timeline))
            )
        return str(taken)

    def lose_sync(self) -> str:
        return str(self.bob.sync(self.token, filter=self.filter)["next_batch"])

    def change_ignored(self) -> str:
        before = self.ignored
        user_ids = [sender.user_id for sender in self.senders]
        self.ignored = set(self.chance.sample(user_ids, self.chance.randrange(3)))
        self.bob.set_ignored_users(self.ignored)
        for kept in (self.sliding, self.sync):
            kept.may_come_again(lambda name: self.sender_of[name] in before - self.ignored)
        return str(self.ignored)

    def leave_or_join(self) -> str:
        room_id = self.rooms[0]
        if room_id in self.joined:
            self.bob.leave(room_id)
            self.joined.remove(room_id)
            return "leave"
        self.bob.join(room_id)
        self.joined.add(room_id)
        for kept in (self.sliding, self.sync):
            kept.may_come_again(self.sent[room_id].__contains__)
        return "join"

    def check(self) -> None:
        """Read until there is nothing more, and compare."""
        if not self.connection.lists:
            self.connection.lists = {"all": self.window(3)}
            # A room that an ignored user sent in brings all its events when it matches again.
            self.sliding.may_come_again(lambda name: True)
        # Until an event is noticed, nothing seems to be left.
        for event_id in self.sender_of:
            eventually(lambda name=event_id: is_recorded(self.homeserver, name))  # type: ignore[misc]
        for _ in range(200):
            self.log.append(f"check: {self.ask(limit=2)}")
            answer = self.connection.answers[-1]
            if not answer.sections and not answer.body["rooms"] and answer.next_batch is None:
                break
        else:
            raise AssertionError("\n".join(["there is always more", *self.log]))
        for _ in range(3):
            self.log.append(f"check: {self.sync_once()}")
        self.compare(self.sliding, self.joined & self.sliding.rooms.keys())
        self.compare(self.sync, self.joined)

    def compare(self, kept: Kept, rooms: Collection[str]) -> None:
        """The client has every live event of these rooms, and got none twice."""
        for room_id in rooms:
            wanted = {e for e in self.sent[room_id] if self.sender_of[e] not in self.ignored}
            missing = wanted.difference(kept.rooms.get(room_id, ()))
            assert not missing, "\n".join([f"missing: {self.numbers(missing)}", *self.log])
        assert not kept.repeated, "\n".join([f"twice: {self.numbers(kept.repeated)}", *self.log])

    def numbers(self, event_ids: Collection[str]) -> list[int]:
        """Short names of sticky events, by the order in which they were sent."""
        names = list(self.sender_of)
        return [names.index(event_id) for event_id in event_ids if event_id in self.sender_of]


@pytest.mark.slow
@pytest.mark.deployments("sqlite")
@pytest.mark.parametrize("seed", range(3))
def test_clients_have_every_live_event_once(homeserver: Homeserver, seed: int) -> None:
    # X3, X4, X7, X8, C1, C3, C5, C8
    walk = Walk(homeserver, seed)
    for _ in range(6):
        for _ in range(8):
            walk.step()
        walk.check()

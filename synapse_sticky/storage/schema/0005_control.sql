-- SPDX-License-Identifier: AGPL-3.0-or-later

-- Why events are held: an event is deliverable once no row of it is left. Such an event
-- has no `position`; its `held_reason` is the last of its reasons, and stays.
CREATE TABLE synapse_sticky_held (
    event_id TEXT NOT NULL,
    reason TEXT NOT NULL,
    PRIMARY KEY (event_id, reason)
);

INSERT INTO synapse_sticky_held (event_id, reason)
SELECT event_id, held_reason FROM synapse_sticky_events
WHERE position IS NULL AND held_reason IS NOT NULL;

-- To look at the events of one room.
CREATE INDEX synapse_sticky_events_room ON synapse_sticky_events (room_id, stream_ordering);

-- What the server's admin has decided: `kind` is 'room', 'user' or 'server', and `subject`
-- its ID or name. `enabled` is 0 or 1.
CREATE TABLE synapse_sticky_overrides (
    kind TEXT NOT NULL,
    subject TEXT NOT NULL,
    enabled SMALLINT NOT NULL,
    reason TEXT,
    until_ts BIGINT,
    PRIMARY KEY (kind, subject)
);

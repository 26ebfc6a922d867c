-- SPDX-License-Identifier: AGPL-3.0-or-later

-- One row for every unexpired sticky event that was noticed. `position` is set
-- once the event is deliverable; `held_reason` says why it is not, or was not before.
-- `revision` comes from the same counter as positions and grows with every
-- change of a row, so that other processes can ask for what changed.
CREATE TABLE synapse_sticky_events (
    event_id TEXT NOT NULL PRIMARY KEY,
    room_id TEXT NOT NULL,
    sender TEXT NOT NULL,
    expires_ts BIGINT NOT NULL,
    stream_ordering BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    position BIGINT,
    held_reason TEXT
);

CREATE UNIQUE INDEX synapse_sticky_events_revision ON synapse_sticky_events (revision);
CREATE INDEX synapse_sticky_events_expires_ts ON synapse_sticky_events (expires_ts);

-- How far Synapse's streams have been read, and the last position given out.
-- There is one row at most.
CREATE TABLE synapse_sticky_progress (
    lock CHAR(1) NOT NULL DEFAULT 'X' UNIQUE,
    events_stream BIGINT NOT NULL,
    backfill_stream BIGINT NOT NULL,
    un_partial_stated_stream BIGINT NOT NULL,
    last_position BIGINT NOT NULL,
    CHECK (lock = 'X')
);

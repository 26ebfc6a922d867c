-- SPDX-License-Identifier: AGPL-3.0-or-later

-- Whether servers in the room are owed the event: those of our own users that
-- Synapse sends out. What was there before this module is not. The column was BOOLEAN
-- up to version 6, and stays so in databases of that time: older code that still runs
-- beside ours could not write a SMALLINT on PostgreSQL. Ours writes and reads both.
ALTER TABLE synapse_sticky_events ADD COLUMN owed SMALLINT NOT NULL DEFAULT 0;

-- Joins of servers are recorded beside those of local users: `member` is the
-- ID of a user or the name of a server.
ALTER TABLE synapse_sticky_joins RENAME COLUMN user_id TO member;

-- Up to which position a server has settled everything that it is owed in a
-- room, counted from its join at `joined_position` (0 if that is long ago).
-- After `expires_ts` nothing that it speaks of can be sticky. Without a row the
-- server is owed everything.
CREATE TABLE synapse_sticky_watermarks (
    server_name TEXT NOT NULL,
    room_id TEXT NOT NULL,
    joined_position BIGINT NOT NULL,
    settled_position BIGINT NOT NULL,
    expires_ts BIGINT NOT NULL,
    PRIMARY KEY (server_name, room_id)
);

CREATE INDEX synapse_sticky_watermarks_expires_ts ON synapse_sticky_watermarks (expires_ts);

-- SPDX-License-Identifier: AGPL-3.0-or-later

-- A local user's newest join to a room that had sticky events at that time:
-- what is older than `position` is due to this user there. Kept as long as
-- anything that old can be sticky.
CREATE TABLE synapse_sticky_joins (
    user_id TEXT NOT NULL,
    room_id TEXT NOT NULL,
    stream_ordering BIGINT NOT NULL,
    instance_name TEXT,
    position BIGINT NOT NULL,
    expires_ts BIGINT NOT NULL,
    PRIMARY KEY (user_id, room_id)
);

CREATE UNIQUE INDEX synapse_sticky_joins_position ON synapse_sticky_joins (position);
CREATE INDEX synapse_sticky_joins_expires_ts ON synapse_sticky_joins (expires_ts);

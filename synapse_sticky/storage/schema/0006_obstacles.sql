-- SPDX-License-Identifier: AGPL-3.0-or-later

-- Why servers were not paid at the last try, as the processes that send to them have found,
-- and until when they are left alone. For the server's admin to see: nothing else reads it.
CREATE TABLE synapse_sticky_obstacles (
    server_name TEXT NOT NULL PRIMARY KEY,
    obstacle TEXT NOT NULL,
    retry_ts BIGINT NOT NULL
);

-- SPDX-License-Identifier: AGPL-3.0-or-later

-- How far each of several event writers was read, beyond the scalar bounds: JSON,
-- [{writer: bound of events}, {writer: bound of backfilled events}].
ALTER TABLE synapse_sticky_progress ADD COLUMN by_writer TEXT NOT NULL DEFAULT '[{}, {}]';

-- A watermark can begin somewhere: then what lies below `settled_from` is owed. So at
-- the first start, where a server joined between events that were sent before.
ALTER TABLE synapse_sticky_watermarks ADD COLUMN settled_from BIGINT NOT NULL DEFAULT 0;

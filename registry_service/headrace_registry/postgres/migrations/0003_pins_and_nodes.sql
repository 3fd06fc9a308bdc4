-- What people and nodes see: the log of residency events, why leases ended, what nodes say of themselves.

-- Events are written by transactions that overlap and may commit in another order than they wrote. So an event gets
-- its `seq` only once it can be read by everybody: under the lock of this table, one publisher at a time. The order of
-- one residency's events is that of `id`, since its device's lock is held while they are written.
CREATE TABLE residency_log (head bigint NOT NULL);
INSERT INTO residency_log SELECT COALESCE(max(seq), 0) FROM residency_events;

-- Events outlive what they tell of: a watcher that was away when a model was deleted still hears how its residencies
-- ended.
ALTER TABLE residency_events DROP CONSTRAINT residency_events_residency_id_fkey;
ALTER TABLE residency_events DROP CONSTRAINT residency_events_pkey;
ALTER TABLE residency_events RENAME COLUMN seq TO id;
ALTER TABLE residency_events ADD PRIMARY KEY (id);
ALTER TABLE residency_events ADD COLUMN seq bigint UNIQUE;
UPDATE residency_events SET seq = id;
CREATE INDEX residency_events_unpublished ON residency_events (id) WHERE seq IS NULL;

ALTER TABLE leases ADD COLUMN end_reason text NOT NULL DEFAULT '';

-- Bytes; 0 while unknown.
ALTER TABLE nodes ADD COLUMN memory_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN memory_free_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN runtime_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS max_loads integer NOT NULL DEFAULT 2,
    ADD COLUMN IF NOT EXISTS max_residents integer NOT NULL DEFAULT 0;
ALTER TABLE devices ADD COLUMN capability text NOT NULL DEFAULT '',
    ADD COLUMN flash_attention boolean NOT NULL DEFAULT false,
    ADD COLUMN IF NOT EXISTS lost_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS total_bytes bigint NOT NULL DEFAULT 0;

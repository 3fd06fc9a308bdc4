-- Residency in depth: one clock, queues, failure memory, learned sizes, limits.

-- The clock of every statement and default. Tests replace it in their own database to move time by hand.
CREATE FUNCTION registry_now() RETURNS timestamptz LANGUAGE sql VOLATILE PARALLEL SAFE
    AS 'SELECT clock_timestamp()';

ALTER TABLE models ALTER create_time SET DEFAULT registry_now(), ALTER update_time SET DEFAULT registry_now();
ALTER TABLE model_events ALTER time SET DEFAULT registry_now();
ALTER TABLE preparations ALTER create_time SET DEFAULT registry_now();
ALTER TABLE nodes ALTER heartbeat_time SET DEFAULT registry_now(), ALTER create_time SET DEFAULT registry_now();
ALTER TABLE residencies ALTER create_time SET DEFAULT registry_now(), ALTER update_time SET DEFAULT registry_now(),
    ALTER last_used_time SET DEFAULT registry_now();
ALTER TABLE residency_events ALTER time SET DEFAULT registry_now();
ALTER TABLE leases ALTER grant_time SET DEFAULT registry_now();
ALTER TABLE pins ALTER create_time SET DEFAULT registry_now();
ALTER TABLE activation_sets ALTER create_time SET DEFAULT registry_now(), ALTER update_time SET DEFAULT registry_now();
ALTER TABLE set_pins ALTER create_time SET DEFAULT registry_now();
ALTER TABLE requests ALTER create_time SET DEFAULT registry_now();

-- 0: no limit.
ALTER TABLE nodes ADD COLUMN IF NOT EXISTS max_loads integer NOT NULL DEFAULT 2,
    ADD COLUMN IF NOT EXISTS max_residents integer NOT NULL DEFAULT 0;
-- Bytes that an unload did not give back; they count as held.
ALTER TABLE devices ADD COLUMN IF NOT EXISTS lost_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS total_bytes bigint NOT NULL DEFAULT 0;

CREATE SEQUENCE residency_queue;
ALTER TABLE residencies
    -- Since when it is in its state.
    ADD COLUMN state_time timestamptz NOT NULL DEFAULT registry_now(),
    -- Its place in line: whoever has a smaller one is served first.
    ADD COLUMN queue_seq bigint NOT NULL DEFAULT nextval('residency_queue'),
    -- What the model would take by its files alone, and what was reserved for it before it was measured.
    ADD COLUMN estimated_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN admitted_bytes bigint NOT NULL DEFAULT 0;
UPDATE residencies SET state_time = update_time, estimated_bytes = reserved_bytes, admitted_bytes = reserved_bytes;

ALTER TABLE waiters
    -- Where the caller allows the model to be; empty: anywhere.
    ADD COLUMN node_id text NOT NULL DEFAULT '',
    ADD COLUMN device_id text NOT NULL DEFAULT '',
    -- The place LoadModel keeps in line for a caller that does not wait itself.
    ADD COLUMN standing boolean NOT NULL DEFAULT false,
    ADD COLUMN actor text NOT NULL DEFAULT '';

-- Where a model failed to load or died of late. A change of its load options makes the row void.
CREATE TABLE load_failures (
    model_id     text NOT NULL REFERENCES models ON DELETE CASCADE,
    node_id      text NOT NULL,
    device_id    text NOT NULL,
    load_options jsonb NOT NULL,
    -- In a row, without a success between; deaths are of runners that had loaded.
    n_failures   integer NOT NULL DEFAULT 0,
    n_deaths     integer NOT NULL DEFAULT 0,
    failure      jsonb NOT NULL,
    fail_time    timestamptz NOT NULL DEFAULT registry_now(),
    death_time   timestamptz,
    -- Not before.
    retry_time   timestamptz NOT NULL,
    PRIMARY KEY (model_id, node_id, device_id),
    FOREIGN KEY (node_id, device_id) REFERENCES devices (node_id, id) ON DELETE CASCADE
);

-- What a model took the last time it was loaded, beside what had been estimated then.
CREATE TABLE learned_sizes (
    model_id        text NOT NULL REFERENCES models ON DELETE CASCADE,
    load_dtype      text NOT NULL,
    quantization    text NOT NULL,
    node_id         text NOT NULL,
    device_id       text NOT NULL,
    device_kind     text NOT NULL,
    estimated_bytes bigint NOT NULL CHECK (estimated_bytes > 0),
    measured_bytes  bigint NOT NULL CHECK (measured_bytes > 0),
    time            timestamptz NOT NULL DEFAULT registry_now(),
    PRIMARY KEY (model_id, load_dtype, quantization, node_id, device_id)
);
INSERT INTO learned_sizes (model_id, load_dtype, quantization, node_id, device_id, device_kind, estimated_bytes,
                           measured_bytes)
SELECT DISTINCT ON (r.model_id, r.load_dtype, r.node_id, r.device_id)
       r.model_id, r.load_dtype, m.quantization, r.node_id, r.device_id, d.kind, r.measured_bytes, r.measured_bytes
FROM residencies r JOIN models m ON m.id = r.model_id JOIN devices d ON d.node_id = r.node_id AND d.id = r.device_id
WHERE r.measured_bytes > 0
ORDER BY r.model_id, r.load_dtype, r.node_id, r.device_id, r.update_time DESC;

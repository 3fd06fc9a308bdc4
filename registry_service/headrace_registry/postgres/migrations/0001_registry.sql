-- The registry's tables. Clock: clock_timestamp() of this database, never a client's.

CREATE TABLE models (
    id                  text PRIMARY KEY,
    identity            text NOT NULL,
    source_kind         text NOT NULL CHECK (source_kind IN ('hub', 'folder', 'gguf')),
    location            text NOT NULL,
    source_revision     text NOT NULL DEFAULT '',
    commit_sha          text NOT NULL DEFAULT '',
    quantization        text NOT NULL DEFAULT 'NONE',
    load_options        jsonb NOT NULL DEFAULT '{}',
    labels              jsonb NOT NULL DEFAULT '{}',
    state               text NOT NULL DEFAULT 'REGISTERED' CHECK (
        state IN ('REGISTERED', 'DOWNLOADING', 'CONVERTING', 'QUANTIZING', 'READY', 'FAILED')),
    failure             jsonb,
    transfer            jsonb,
    architecture        jsonb,
    n_parameters        bigint NOT NULL DEFAULT 0,
    weight_bytes        bigint NOT NULL DEFAULT 0,
    parameters_by_dtype jsonb NOT NULL DEFAULT '{}',
    files_path          text NOT NULL DEFAULT '',
    tokenizer_digest    text NOT NULL DEFAULT '',
    revision            bigint NOT NULL DEFAULT 1,
    event_seq           bigint NOT NULL DEFAULT 0,
    create_time         timestamptz NOT NULL DEFAULT clock_timestamp(),
    update_time         timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX models_identity ON models (identity);
CREATE INDEX models_labels ON models USING gin (labels);

-- One row per event of a model, with the model as it was after it.
CREATE TABLE model_events (
    model_id text NOT NULL REFERENCES models ON DELETE CASCADE,
    seq      bigint NOT NULL,
    time     timestamptz NOT NULL DEFAULT clock_timestamp(),
    message  text NOT NULL,
    model    jsonb NOT NULL,
    PRIMARY KEY (model_id, seq)
);

-- Work on a model's files. A replica that works on it renews its claim; any replica takes over what is unclaimed.
CREATE TABLE preparations (
    model_id          text PRIMARY KEY REFERENCES models ON DELETE CASCADE,
    claimed_by        text,
    claim_expire_time timestamptz,
    target_path       text NOT NULL DEFAULT '',
    node_id           text,
    done              boolean NOT NULL DEFAULT false,
    failure           jsonb,
    report_time       timestamptz,
    create_time       timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE nodes (
    id             text PRIMARY KEY,
    address        text NOT NULL,
    epoch          bigint NOT NULL,
    boot_nonce     text NOT NULL,
    state          text NOT NULL CHECK (state IN ('ALIVE', 'LOST')),
    version        text NOT NULL DEFAULT '',
    heartbeat_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    create_time    timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Its row is the lock under which everything about a device's memory is decided.
CREATE TABLE devices (
    node_id        text NOT NULL REFERENCES nodes ON DELETE CASCADE,
    id             text NOT NULL,
    kind           text NOT NULL CHECK (kind IN ('CPU', 'CUDA', 'MPS')),
    name           text NOT NULL DEFAULT '',
    capacity_bytes bigint NOT NULL CHECK (capacity_bytes > 0),
    free_bytes     bigint NOT NULL DEFAULT 0,
    ordinal        integer NOT NULL DEFAULT 0,
    present        boolean NOT NULL DEFAULT true,
    PRIMARY KEY (node_id, id)
);

CREATE SEQUENCE residency_fences;

CREATE TABLE residencies (
    id             text PRIMARY KEY,
    model_id       text NOT NULL REFERENCES models ON DELETE CASCADE,
    node_id        text NOT NULL,
    device_id      text NOT NULL,
    state          text NOT NULL CHECK (
        state IN ('QUEUED', 'LOADING', 'RESIDENT', 'DRAINING', 'UNLOADING', 'UNLOADED', 'FAILED', 'LOST')),
    -- Set while a silent node may come back: what the residency was when the node fell silent.
    state_when_lost text,
    reserved_bytes bigint NOT NULL CHECK (reserved_bytes >= 0),
    measured_bytes bigint NOT NULL DEFAULT 0,
    load_dtype     text NOT NULL,
    fence          bigint NOT NULL DEFAULT 0,
    lease_fence    bigint NOT NULL DEFAULT 0,
    node_epoch     bigint NOT NULL,
    reason         text NOT NULL,
    actor          text NOT NULL,
    transfer       jsonb,
    failure        jsonb,
    create_time    timestamptz NOT NULL DEFAULT clock_timestamp(),
    update_time    timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_used_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    FOREIGN KEY (node_id, device_id) REFERENCES devices (node_id, id)
);
CREATE UNIQUE INDEX residencies_one_per_device ON residencies (model_id, node_id, device_id)
    WHERE state IN ('QUEUED', 'LOADING', 'RESIDENT');
CREATE INDEX residencies_active ON residencies (node_id, device_id)
    WHERE state NOT IN ('UNLOADED', 'FAILED', 'LOST');
CREATE INDEX residencies_newest ON residencies (create_time DESC, id);

CREATE TABLE residency_events (
    seq          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    residency_id text NOT NULL REFERENCES residencies ON DELETE CASCADE,
    model_id     text NOT NULL,
    time         timestamptz NOT NULL DEFAULT clock_timestamp(),
    state        text NOT NULL,
    reason       text NOT NULL,
    actor        text NOT NULL,
    residency    jsonb NOT NULL
);
CREATE INDEX residency_events_of_model ON residency_events (model_id, seq);

-- Calls that wait for a residency. One that stops renewing is gone.
CREATE TABLE waiters (
    id           text PRIMARY KEY,
    residency_id text NOT NULL REFERENCES residencies ON DELETE CASCADE,
    expire_time  timestamptz NOT NULL
);
CREATE INDEX waiters_of_residency ON waiters (residency_id);

CREATE TABLE leases (
    id           text PRIMARY KEY,
    residency_id text NOT NULL REFERENCES residencies ON DELETE CASCADE,
    model_id     text NOT NULL,
    holder       text NOT NULL,
    request_id   text NOT NULL DEFAULT '',
    fence        bigint NOT NULL,
    ttl_s        double precision NOT NULL,
    state        text NOT NULL DEFAULT 'HELD' CHECK (state IN ('HELD', 'RELEASED', 'EXPIRED', 'LOST')),
    grant_time   timestamptz NOT NULL DEFAULT clock_timestamp(),
    expire_time  timestamptz NOT NULL,
    end_time     timestamptz
);
CREATE INDEX leases_held ON leases (residency_id) WHERE state = 'HELD';
CREATE UNIQUE INDEX leases_by_request ON leases (request_id) WHERE request_id <> '' AND state = 'HELD';

CREATE TABLE pins (
    model_id    text NOT NULL REFERENCES models ON DELETE CASCADE,
    node_id     text NOT NULL DEFAULT '',
    owner       text NOT NULL,
    reason      text NOT NULL DEFAULT '',
    expire_time timestamptz,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (model_id, node_id, owner)
);

CREATE TABLE activation_sets (
    id          text NOT NULL,
    node_id     text NOT NULL REFERENCES nodes ON DELETE CASCADE,
    model_id    text NOT NULL,
    corpus_id   text NOT NULL,
    columns     text[] NOT NULL,
    n_rows      bigint NOT NULL,
    size_bytes  bigint NOT NULL,
    complete    boolean NOT NULL,
    retention   text NOT NULL,
    path        text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    update_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (id, node_id)
);
CREATE INDEX activation_sets_newest ON activation_sets (create_time DESC, id, node_id);

CREATE TABLE set_pins (
    set_id      text NOT NULL,
    owner       text NOT NULL,
    reason      text NOT NULL DEFAULT '',
    expire_time timestamptz,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (set_id, owner)
);

-- What a request_id was answered with.
CREATE TABLE requests (
    request_id  text NOT NULL,
    method      text NOT NULL,
    arguments   text NOT NULL,
    response    text NOT NULL,
    create_time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (request_id, method)
);
CREATE INDEX requests_by_age ON requests (create_time);

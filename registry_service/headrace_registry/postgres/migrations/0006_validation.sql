-- Quantized weights and what they changed; attempts of the test profile.

ALTER TABLE models
    ADD COLUMN fidelity jsonb,
    -- The unquantized files that the weights were made from; they may be gone.
    ADD COLUMN base_path text NOT NULL DEFAULT '';
CREATE INDEX models_base ON models (base_path) WHERE base_path <> '';

ALTER TABLE preparations
    -- Unquantized files in use: to be quantized, or shared with another model.
    ADD COLUMN source_path text NOT NULL DEFAULT '',
    ADD COLUMN fidelity jsonb;

CREATE TABLE validation_attempts (
    id             text PRIMARY KEY,
    model_id       text NOT NULL REFERENCES models ON DELETE CASCADE,
    node_id        text NOT NULL,
    device_id      text NOT NULL,
    node_epoch     bigint NOT NULL,
    load_options   jsonb NOT NULL,
    quantization   text NOT NULL,
    -- Held on the device until it is done.
    reserved_bytes bigint NOT NULL,
    steps          jsonb NOT NULL DEFAULT '[]',
    done           boolean NOT NULL DEFAULT false,
    passed         boolean NOT NULL DEFAULT false,
    failure        jsonb,
    versions       jsonb NOT NULL DEFAULT '{}',
    -- Renewed by the call that waits for it; past it nobody does.
    expire_time    timestamptz NOT NULL,
    create_time    timestamptz NOT NULL DEFAULT registry_now(),
    update_time    timestamptz NOT NULL DEFAULT registry_now()
);
CREATE INDEX validation_attempts_of_model ON validation_attempts (model_id, create_time DESC, id DESC);
CREATE INDEX validation_attempts_running ON validation_attempts (node_id) WHERE NOT done;

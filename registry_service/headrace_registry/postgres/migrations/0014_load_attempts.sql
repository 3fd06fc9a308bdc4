-- Every load leaves an attempt, as a run of the test profile does.
ALTER TABLE validation_attempts
    ADD COLUMN kind         text NOT NULL DEFAULT 'VALIDATION' CHECK (kind IN ('VALIDATION', 'LOAD')),
    ADD COLUMN residency_id text NOT NULL DEFAULT '',
    ADD COLUMN log_tail     text NOT NULL DEFAULT '',
    ADD COLUMN notes        text NOT NULL DEFAULT '';

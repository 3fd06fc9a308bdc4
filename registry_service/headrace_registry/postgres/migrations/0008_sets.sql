-- What nodes say of their sets beside the figures, and what is ordered.
ALTER TABLE activation_sets
    ADD COLUMN last_used_time timestamptz NOT NULL DEFAULT registry_now(),
    -- Who reads or extends it, as its node said last.
    ADD COLUMN holders text[] NOT NULL DEFAULT '{}',
    -- Its node removes it as soon as nobody uses it.
    ADD COLUMN deleting boolean NOT NULL DEFAULT false;

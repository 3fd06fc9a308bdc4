-- When a load began and when the model was there: the time it took, and since when it is loaded.
ALTER TABLE residencies
    ADD COLUMN load_begin_time timestamptz,
    ADD COLUMN resident_time   timestamptz;

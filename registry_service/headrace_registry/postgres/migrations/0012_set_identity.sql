-- What the rows of a set depend on, as its node reports it.
ALTER TABLE activation_sets ADD COLUMN identity_json text NOT NULL DEFAULT '';

-- Until then a model that is being deleted with force is not loaded again: it would never leave memory otherwise.
ALTER TABLE models ADD COLUMN deleting_until timestamptz;

-- Licence and dtype, as the authors of a model give them.
ALTER TABLE models ADD COLUMN card jsonb;

-- The model store: what its folders hold, who loads from them, and what is to be removed.

ALTER TABLE models ADD COLUMN store_bytes bigint NOT NULL DEFAULT 0;
ALTER TABLE models ADD COLUMN last_used_time timestamptz;
CREATE INDEX models_files ON models (files_path) WHERE files_path <> '';
CREATE INDEX models_location ON models (location, commit_sha);

-- One row per folder, written before the folder is made: a folder without a row is not ours to remove.
-- `model_id` outlives its model. `doom_time` is set once nothing refers to the folder; any replica then removes it.
CREATE TABLE store_folders (
    path           text PRIMARY KEY,
    model_id       text NOT NULL,
    reserved_bytes bigint NOT NULL DEFAULT 0,
    doom_time      timestamptz,
    create_time    timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX store_folders_of_model ON store_folders (model_id);
CREATE INDEX store_folders_doomed ON store_folders (doom_time) WHERE doom_time IS NOT NULL;

INSERT INTO store_folders (path, model_id)
SELECT DISTINCT ON (files_path) files_path, id FROM models
WHERE source_kind IN ('hub', 'gguf') AND files_path <> '' ORDER BY files_path, create_time, id;

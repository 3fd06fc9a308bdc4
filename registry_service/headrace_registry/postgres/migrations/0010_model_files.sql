-- The files of models as they were when the models became READY. A table of its own: each event of a model stores the
-- model's whole row, and a model may have thousands of files.
CREATE TABLE model_files (
    model_id     text PRIMARY KEY REFERENCES models (id) ON DELETE CASCADE,
    path         text NOT NULL,                 -- The folder of `files`.
    files        jsonb NOT NULL,                -- Stamps of the files that a load reads.
    source_files jsonb NOT NULL DEFAULT '[]',   -- Stamps of the GGUF file, or of its parts.
    -- The files may differ from their stamps: the next preparation reads them before it uses them.
    distrusted   boolean NOT NULL DEFAULT false
);

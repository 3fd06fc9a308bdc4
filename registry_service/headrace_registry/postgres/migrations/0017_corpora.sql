-- Which node holds which documents under which id: one id names the same documents everywhere.
CREATE TABLE corpora (
    id          text NOT NULL,
    node_id     text NOT NULL REFERENCES nodes ON DELETE CASCADE,
    digest      text NOT NULL,
    update_time timestamptz NOT NULL DEFAULT registry_now(),
    PRIMARY KEY (id, node_id)
);
CREATE INDEX corpora_of_node ON corpora (node_id);

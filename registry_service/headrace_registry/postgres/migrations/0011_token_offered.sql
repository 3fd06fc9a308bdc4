-- A hub token is never stored; that one was offered is, so that a registry which takes a preparation over can say so.
ALTER TABLE preparations ADD COLUMN token_offered boolean NOT NULL DEFAULT false;

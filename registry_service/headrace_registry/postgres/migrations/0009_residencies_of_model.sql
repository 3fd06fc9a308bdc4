-- For unloading a model: also what silent nodes would bring back is looked for, which the indexes of what is active leave out.
CREATE INDEX residencies_of_model ON residencies (model_id);

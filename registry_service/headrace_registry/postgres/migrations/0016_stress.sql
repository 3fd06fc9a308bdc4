-- Indexes by which old rows are removed and dead nodes found however many rows there are.
CREATE INDEX leases_of_residency ON leases (residency_id);
CREATE INDEX leases_running ON leases (expire_time) WHERE state = 'HELD';
CREATE INDEX leases_ended ON leases (end_time) WHERE state <> 'HELD';
CREATE INDEX residencies_ended ON residencies (update_time) WHERE state IN ('UNLOADED', 'FAILED', 'LOST');
CREATE INDEX model_events_by_time ON model_events (time);

-- Bytes of an attempt that is over count until its node has freed them.
ALTER TABLE validation_attempts ADD COLUMN held boolean NOT NULL DEFAULT true;
UPDATE validation_attempts SET held = NOT done;
CREATE INDEX validation_attempts_held ON validation_attempts (node_id) WHERE held;

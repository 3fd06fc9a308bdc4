"""The registry: the models that exist, the devices where they are resident, and the leases on them.

Decisions are plain Python: `models/` (files and builds), `residency/` (placement and scheduling), `sizing/` (bytes).
Three rooms hold the outside: `rpc/` (gRPC), `postgres/` (psycopg, SQL, the embedded server) and `hub/`
(huggingface_hub, in a child process). `workers/` runs the loops between them.
"""

"""The registry: which models exist, where they are resident, who relies on it.

The centre is plain Python about models, residencies and leases. Three rooms hold the outside: `rpc/` (gRPC),
`postgres/` (psycopg, SQL, the embedded server) and `hub/` (huggingface_hub, in a child process).
"""

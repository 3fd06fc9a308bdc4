"""What both servers are built on: lifecycle, authentication, status mapping, metrics, logs, health.

A service hands `chassis.server.Server` its servicers and one table of errors; handlers then simply raise. The only
room besides a service's own `rpc/` that knows gRPC. Nothing here knows a model, a lease or an activation.
"""

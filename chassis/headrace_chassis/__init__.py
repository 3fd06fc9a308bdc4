"""The base of both servers: lifecycle, authentication, status mapping, metrics, logs, health.

A service hands `headrace_chassis.server.Server` its servicers and one table of errors; handlers then simply raise.
Only this package and the `rpc/` room of each service import gRPC. Nothing here knows a model, a lease or an activation.
"""

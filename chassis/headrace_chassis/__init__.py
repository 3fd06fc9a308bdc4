"""What both servers are built on: lifecycle, authentication, status mapping, metrics, logs, health.

A service hands `headrace_chassis.server.Server` its servicers and one table of errors; handlers then simply raise.
Beside a service's own `rpc/`, no other room knows gRPC. Nothing here knows a model, a lease or an activation.
"""

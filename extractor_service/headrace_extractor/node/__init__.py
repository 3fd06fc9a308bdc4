"""This node: its devices, and the work that the registry wants done on them.

`node` loads and unloads models as the registry's desired state says, and starts builds (`builds`) and validations
(`validations`). A model is only ever loaded in a runner, a child process (`runner_process`) that takes the messages of
`runner_protocol`. `reclaim` ends runners and accounts for their memory, `devices` lists the devices, and `reporting`
tries to get reports to the registry. The registry and the runners are reached through `ports`; the data that
crosses them is in `values`. This room imports neither gRPC nor torch, and every object belongs to one event loop.
"""

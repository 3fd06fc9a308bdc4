"""Messages to values and back: total functions, `x_from_pb` and `x_to_pb`. Only `_transport` knows stubs too."""

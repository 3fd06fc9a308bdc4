"""Messages to values and back: pairs of total functions, `x_from_pb` and `x_to_pb`."""

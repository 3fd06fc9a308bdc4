"""The named places in a network at which activations are captured, known from a model's config.json alone.

`catalogue` is the entry: it lists a model's hookpoints with their shapes, and resolves the names of a request. `names`
knows aliases, wildcards and module paths; `architectures` is the table of model families; `places` gives the module of
a hookpoint in a family, and the part of its tensor to take. `network` reads the config, `weight_shapes` the headers of
weight files. No weights are loaded. A model always gives the same names: they are part of a set's identity.
"""

"""The model inside a worker: flat parameters and gradients, the optimizer, layers, buffers."""

"""Pure algorithms over ints, lists and tensors: no actors, no options, no clocks."""

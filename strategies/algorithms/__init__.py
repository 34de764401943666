"""Algorithms over plain ints, lists and tensors: no actor, no options object, no clock."""

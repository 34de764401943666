"""A train function: the user's own loop, with what `prepare` and `report` do for it."""

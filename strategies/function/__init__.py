"""Train functions: the session behind `prepare` and `report` in a user's own training loop."""

"""Running a model that is cut into stages: its parts, their messages, a step of a schedule."""

"""Pipeline parallelism: stages of a model, their messages, and execution of a schedule."""

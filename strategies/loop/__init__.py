"""Training inside a worker: batches, forward and backward, the step loop, a session."""

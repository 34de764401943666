"""What happens inside a worker: flat parameters, batches, the step loop. The home of torch."""

"""Ways to sum gradients over a group: overlapped buckets, compression, sharded."""

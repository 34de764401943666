"""What ranks give to a checkpoint and read from it, and the newest state that they share."""

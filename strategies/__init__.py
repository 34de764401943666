"""What is computed and exchanged. One strategy is one file here; importing them costs no torch."""

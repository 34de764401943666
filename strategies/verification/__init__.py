"""What `distplat verify` compares runs with, and how: references that owe nothing to the engine."""

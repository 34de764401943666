"""Collective operations of the ranks of one node, through memory that they share."""

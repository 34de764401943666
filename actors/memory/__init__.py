"""Memory that processes of one node share, and how they wake each other."""

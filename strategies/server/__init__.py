"""Parameter servers and embedding servers: their stores, and the server that workers call."""

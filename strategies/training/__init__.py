"""The server side of training: shards, their services, clients and replay."""

"""Embedding tables whose rows live on servers: row store, service, client, modules."""

"""Servers of parameters and of embedding tables: what each keeps, and how many workers call it."""

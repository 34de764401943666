"""The command line. No module imports torch, and Ray is imported only by commands that need it."""

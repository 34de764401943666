"""The command line: `distplat submit` and its family. No torch, and Ray only where it must be."""

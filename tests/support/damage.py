"""Damage to files of a run."""

from pathlib import Path


def corrupt(checkpoint: Path) -> None:
    """Flip a bit in a checkpoint's model."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)

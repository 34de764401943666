"""Unit tests start no processes of Ray and keep to one core."""

import torch

torch.set_num_threads(1)

"""Unit tests start no processes of Ray and keep to one core."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one makes an example slow
settings.load_profile("any machine")

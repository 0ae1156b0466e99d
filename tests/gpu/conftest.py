"""Tests of tensors that lie on a GPU; without one there is nothing to collect here."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

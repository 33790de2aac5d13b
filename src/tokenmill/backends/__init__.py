"""What a backend is, and the backends: native.py (C++ kernels) and torch.py (any torch device, the oracle)."""

"""Training speed: our compiled step beside the same model in PyTorch, eager and compiled."""

"""Training: data, optimizers and the compiled loop."""

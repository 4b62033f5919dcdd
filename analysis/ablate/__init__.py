"""The command `minitf ablate`: what a model loses when its association is replaced."""

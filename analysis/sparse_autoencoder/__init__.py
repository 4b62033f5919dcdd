"""Sparse autoencoders: vectors of a walk as sparse sums of learned directions, and what is lost by that.

``autoencoder`` is the model, with its ``activations`` and ``losses``; ``training`` fits it, ``evaluation``
measures it, and ``place`` says where in a walk it reads and is put in.
"""

"""Public families of models: how each writes its configuration and what it calls its weights.

One small file per family. The mapping of weights is data (:class:`minitf.families.mapping.Tensor`) and serves
both ways, so what is read can be written again, bit for bit.
"""

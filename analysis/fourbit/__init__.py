"""What four bits do to Adam's moments: probes of single tensors, moments over many steps, training, claims.

``probes`` codes tensors once, ``moments`` keeps them coded over many steps, ``training`` compares whole runs,
``claims`` says what they show, ``bench`` what a step costs.
"""

"""The command ``minitf plan``: what a training run needs on each device, on paper, before it runs.

``model`` has the formulas, ``devices`` what is known of devices, ``job`` the plan for one mesh and for many.
"""

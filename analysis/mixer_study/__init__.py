"""Every mixer trained from scratch on the same tasks: what is a data-dependent association needed for?"""

"""The command ``minitf train``: a run folder, what is measured on the way, and the report."""

"""Scan and Snap (Tian et al. 2023, arXiv 2305.16380) and JoMA (arXiv 2310.00535), reproduced and reported."""

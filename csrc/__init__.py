"""Kernel families; one family is one folder with a plain-torch reference and one typed door per op."""

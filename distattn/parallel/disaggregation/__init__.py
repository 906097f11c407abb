"""Core attention disaggregation: which rank computes which part of the attention of all ranks (DistCA, arXiv 2510.18121)."""

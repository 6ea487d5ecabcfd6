"""Speculative decoding: which proposer pays for a checkpoint, measured before a server is told so.

A proposer guesses the next k tokens, the target judges all of them in one pass, and as many as it accepts
cost one step (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023, arXiv 2302.01318).
"""

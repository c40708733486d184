"""Searches of others, written anew from their papers, on the same model, prompts and runtime as ours.

Each is a function from a `Bench` and a seed to a stream of (evaluations so far, best mask so far, its own score of it).
None is told our costs or counts unless its paper has them; what a mask is worth is decided afterwards, alike for all.
"""

"""Faults made by machine: a MindIR graph with one node or constant changed, and what of the gate sees it."""

"""Doors for the objects that people train with. None is imported unless it is used.

keras       model.fit on JAX: a callback that records, and what bisects and diagnoses its runs
"""

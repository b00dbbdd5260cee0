"""Whole passes over a data set: scan, merge, pack, verify, and what interrupts and resumes them."""

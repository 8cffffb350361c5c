"""Tutorials: scripts to read and run, `python -m training.tutorials.NAME`, and to open as notebooks by jupytext."""

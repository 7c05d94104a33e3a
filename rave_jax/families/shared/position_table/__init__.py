"""Towers that read pictures of any size with a learned table of positions, and videos with times between the frames.

It is what several families share, and no family of its own (arXiv 2511.21631). A tower may also give features for the
first decoder layers (DeepStack, arXiv 2406.04334).
"""

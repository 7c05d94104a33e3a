"""Pictures of any size, each a grid of merge units: what several families share, and no family of its own.

A picture is resized to whole merge units, near its own size; a video is a grid of several frames (arXiv 2409.12191).
"""

"""Studies: arms trained under the same seeds, kept rows, what their differences decide, and a page about it."""

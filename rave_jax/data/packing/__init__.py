"""Packing: several samples of any size in a row, planned from their sizes alone before any of them is loaded."""

"""A page of rows as the model sees them, made from a `Batch` alone."""

from rave_jax.look.rows.page import page
from rave_jax.look.rows.row import PackedRow, packed_rows
from rave_jax.look.rows.spelling import Spelling

__all__ = ["PackedRow", "Spelling", "packed_rows", "page"]

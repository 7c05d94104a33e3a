"""Array types and the one legend of axis letters.

| letter | axis                        | letter | axis                                |
|--------|-----------------------------|--------|-------------------------------------|
| B      | batch rows                  | V      | vocabulary                          |
| T      | query length                | P      | patches of a row                    |
| S      | key length                  | C      | numbers in a flattened patch        |
| D      | model width                 | R      | regions                             |
| H      | query heads                 | m      | tokens in a region                  |
| K      | key/value heads             | r      | gate rank                           |
| G      | query heads per kv head H/K | L      | layers                              |
| h      | head_dim                    | F      | mlp width                           |
| E      | experts                     |        |                                     |

Einsum strings and shape comments use these letters and no others. A letter that is local to one
function (N, for a count) is explained where it is used. Gaze's K is `top_k` in code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int, Int8, UInt8, UInt32

if TYPE_CHECKING:
    from jax import Array
    from numpy import ndarray as NpArray
else:
    Array = NpArray = Any

__all__ = ["Array", "Bool", "Float", "Int", "Int8", "NpArray", "UInt8", "UInt32"]

"""The torch side of processors: torchvision's transforms in Python. Import it before transformers.

Its own operators are built for another torch than the CPU's. The processors use none of them, but the package asks for
their names as it is imported, so they are declared here.
"""

import re
import sys
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "vision"
"""Where it is installed (.ci/run), apart from what the other scripts import; with `num2words`, by which SmolVLM's
processor writes numbers of frames."""

sys.path.append(str(FOLDER))
_asked = (FOLDER / "torchvision" / "_meta_registrations.py").read_text()
OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in set(re.findall(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"', _asked)):
    OPERATORS.define(f"{_name}(Tensor x) -> Tensor")

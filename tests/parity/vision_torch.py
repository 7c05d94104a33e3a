"""The torch side of processors: torchvision's transforms in Python. Import it before transformers.

Its own operators are built for another torch than the CPU's. The processors use none of them, but the package asks for
their names as it is imported, so they are declared here.
"""

import importlib.machinery
import re
import sys
import types
from pathlib import Path

import torch

FOLDER = Path(sys.prefix) / "vision"
"""Where it is installed (.ci/run), apart from what the other scripts import."""

sys.path.append(str(FOLDER))
_asked = (FOLDER / "torchvision" / "_meta_registrations.py").read_text()
OPERATORS = torch.library.Library("torchvision", "DEF")
for _name in set(re.findall(r'(?:register_meta\("|register_fake\("torchvision::)(\w+)"', _asked)):
    OPERATORS.define(f"{_name}(Tensor x) -> Tensor")

# SmolVLM's processor asks for a package that writes out the number of a video's frames, though pictures need none.
NUMBERS = types.ModuleType("num2words")
NUMBERS.__spec__ = importlib.machinery.ModuleSpec("num2words", None)
NUMBERS.num2words = str
sys.modules.setdefault("num2words", NUMBERS)

"""Pictures and questions made in code, a file per task: the default data, with no file to download."""

from rave_jax.data.synthetic.album import Album
from rave_jax.data.synthetic.bar_chart import BarChart
from rave_jax.data.synthetic.counting import Counting
from rave_jax.data.synthetic.digit_mosaic import DigitMosaic
from rave_jax.data.synthetic.long_receipt import LongReceipt
from rave_jax.data.synthetic.mosaic_list import MosaicList
from rave_jax.data.synthetic.position_mosaic import PositionMosaic
from rave_jax.data.synthetic.receipt import Receipt
from rave_jax.data.synthetic.scatter import Scatter
from rave_jax.data.synthetic.source import Synthetic, SyntheticSource, SyntheticTask

__all__ = [
    "Album",
    "BarChart",
    "Counting",
    "DigitMosaic",
    "LongReceipt",
    "MosaicList",
    "PositionMosaic",
    "Receipt",
    "Scatter",
    "Synthetic",
    "SyntheticSource",
    "SyntheticTask",
]

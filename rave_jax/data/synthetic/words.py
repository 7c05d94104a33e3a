"""Words printed in the pictures. No word of a train list is in a held-out list, whatever list it is in."""

from __future__ import annotations

from dataclasses import dataclass

from rave_jax.data.synthetic.base import Split


@dataclass(frozen=True)
class Words:
    """The words of one split.

    Attributes:
        bars: short words under bars.
        qualities, goods: first and second word of an item on a receipt.
        places, trades: first and second word of a shop's name.
        streets, ways: first and second word of its street.
        farewells: last line of a receipt, four words each.
    """

    bars: tuple[str, ...]
    qualities: tuple[str, ...]
    goods: tuple[str, ...]
    places: tuple[str, ...]
    trades: tuple[str, ...]
    streets: tuple[str, ...]
    ways: tuple[str, ...]
    farewells: tuple[str, ...]


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WORDS: dict[Split, Words] = {
    "train": Words(
        bars=_listed("ant bat cat dog elk fox hen jay owl pig ram yak bus cab jet van bed box cup key lid mug pan rug"),
        qualities=_listed(
            "brown salted fresh plain smoked frozen roasted dried small large sweet sour ripe baked spicy dark "
            "ground whole mild crisp"
        ),
        goods=_listed(
            "bread milk butter cheese rice pasta tea coffee sugar flour apples pears plums grapes carrots onions "
            "beans peas lentils chicken beef salmon tuna eggs yogurt honey jam juice water cola crackers biscuits "
            "almonds walnuts soap candles"
        ),
        places=_listed("Maple Harbour Sunny Royal Corner Silver Green Village Northern Eastern Lucky Central"),
        trades=_listed("Market Grocery Foods Store Depot Bakery Shop Deli"),
        streets=_listed("Oak Church Mill Station Park King Bridge Victoria Hill Garden"),
        ways=_listed("Street Road Lane Avenue"),
        farewells=("Thank you come again", "We hope you enjoy", "Keep this for returns", "See our daily offers"),
    ),
    "heldout": Words(
        bars=_listed("ape bee cow eel gnu rat hat jar net pen saw tub"),
        qualities=_listed("golden white creamy raw sliced pickled grilled bitter tender chopped"),
        goods=_listed(
            "muffins cream oats noodles cocoa syrup peaches melons cherries potatoes tomatoes spinach cabbage "
            "turkey shrimp mustard vinegar lemonade pretzels cashews"
        ),
        places=_listed("Cedar Lakeside Crystal Union Meadow Highland"),
        trades=_listed("Provisions Bazaar Kitchen Larder"),
        streets=_listed("Elm Castle River School Forest"),
        ways=_listed("Drive Row Close Terrace"),
        farewells=("Have a nice day", "Visit us soon friend"),
    ),
}

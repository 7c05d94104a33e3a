"""Something that is done beside a save, and before which the checkpoint is not finished.

orbax finishes a checkpoint when the handlers of all its parts have written; the one of its JSON data waits for more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from orbax.checkpoint import v1 as ocp

Handler = ocp.handlers.CheckpointableHandler


def json_behind(before: Callable[[], None]) -> type[Handler[Any, None]]:
    """A handler of JSON data that has something done in the background of each save. The save fails with it.

    Args:
        before: called once a save, in a thread of its own.
    """
    plain = ocp.handlers.JsonHandler()

    class JsonBehind(Handler[Any, None]):
        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            written = await plain.save(directory, checkpointable)

            async def in_background() -> None:
                await asyncio.gather(asyncio.to_thread(before), written)

            return in_background()

        async def load(self, directory: Any, abstract_checkpointable: None = None) -> Awaitable[Any]:
            return await plain.load(directory, abstract_checkpointable)

        async def metadata(self, directory: Any) -> None:
            return await plain.metadata(directory)

        def is_handleable(self, checkpointable: Any) -> bool:
            return plain.is_handleable(checkpointable)

        def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
            return plain.is_abstract_handleable(abstract_checkpointable)

    return JsonBehind

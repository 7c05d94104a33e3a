"""How orbax writes the parts of a checkpoint, with two things that it does not do.

A part that cannot be written is told at once. In a job of several processes orbax raises what one of them meets only
after a barrier, to which the others, who wait for the part at another barrier, do not come for many minutes.

And a checkpoint is not finished before something else is done beside the save: orbax finishes one when the handlers of
all parts have written, so the handler of one part waits for more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from orbax.checkpoint import v1 as ocp

Handler = ocp.handlers.CheckpointableHandler[Any, Any]


class Hooks(NamedTuple):
    """What is called in the background of a save, in threads of orbax.

    Fields:
        failed: told what a part could not be written for.
        before: done once a save, before the checkpoint is finished; what it raises is told too.
    """

    failed: Callable[[BaseException], None]
    before: Callable[[], None] | None = None


def hooked(kind: type[Handler], hooks: Hooks, *, waits: bool = False) -> type[Handler]:
    """The handlers of a kind, which call hooks.

    Args:
        kind: of orbax's handlers; a checkpoint says that this one has written it.
        hooks: to call.
        waits: is it the part that waits for `before`?
    """

    class Hooked(Handler):
        def __init__(self) -> None:
            self._plain = kind()

        async def save(self, directory: Any, checkpointable: Any) -> Awaitable[None]:
            return self._in_background(await self._plain.save(directory, checkpointable))

        async def _in_background(self, written: Awaitable[None]) -> None:
            try:
                if waits and hooks.before is not None:
                    await asyncio.gather(asyncio.to_thread(hooks.before), written)
                else:
                    await written
            except BaseException as error:
                hooks.failed(error)
                raise

        async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Any]:
            return await self._plain.load(directory, abstract_checkpointable)

        async def metadata(self, directory: Any) -> Any:
            return await self._plain.metadata(directory)

        def is_handleable(self, checkpointable: Any) -> bool:
            return self._plain.is_handleable(checkpointable)

        def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
            return self._plain.is_abstract_handleable(abstract_checkpointable)

    # A checkpoint names its handlers by module and class; any orbax knows its own.
    Hooked.__module__, Hooked.__qualname__ = kind.__module__, kind.__qualname__
    return Hooked

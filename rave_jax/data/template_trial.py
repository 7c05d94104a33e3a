"""A chat template tried in a process of its own, which has a bound of time and memory (see `template.py`).

It is run as a script and imports nothing of the package, so that it starts quickly. It reads a JSON object from stdin,
{"template", "variables", "conversations", "memory", "seconds", "path"}, and renders each conversation with and without
a generation prompt. It exits with 0 whatever the template says, and otherwise only if the template asks for too much.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import Any

TOO_MUCH = 3
"""The exit code for a template that asks for more memory, calls or steps than there are."""


def trial() -> int:
    """Render; returns the exit code."""
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"] + 1))
    sys.path[:0] = request["path"]
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    Generation.tags = {"generation"}

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # What transformers gives its templates.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False)
    given: dict[str, Any] = {"raise_exception": raise_exception, "strftime_now": lambda form: "1 January 2026"}
    environment.globals.update(given)
    with contextlib.suppress(AttributeError, OSError, ValueError):  # systems without such a limit
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    try:
        template = environment.from_string(request["template"])
        for messages in request["conversations"]:
            for asks in (False, True):
                try:
                    length = 0
                    values = request["variables"] | {"messages": messages, "add_generation_prompt": asks}
                    for piece in template.generate(**values):
                        length += len(piece)
                        if length > request["memory"]:
                            raise MemoryError
                except (RecursionError, MemoryError, OverflowError):
                    raise
                except Exception:  # what a template refuses is told where it is rendered for use
                    pass
    except (RecursionError, MemoryError, OverflowError) as error:
        print(type(error).__name__, error)
        return TOO_MUCH
    except Exception:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(trial())

"""`rave-jax`: train, eval, convert, inspect, logits, generate, calibrate, look, data, plan, study.

Each subcommand imports what it needs when it runs, so that --help is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rave_jax.command_line import STUDIES, config_names
from rave_jax.config import ConfigError, local_path
from rave_jax.observe.messages import plain_messages

DTYPES = ("float32", "bfloat16")
EXIT_INPUT = 2
"""Misuse, or input that cannot be used."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells have it."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    late: Callable[[argparse.ArgumentParser], None] | None = None
    """Adds flags that take long to know. Called when this parser is the one that is used."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        late, self.late = self.late, None
        if late is not None:
            late(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"{self.prog}: {message} ({self.prog} --help says more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rave-jax", description="Train, evaluate, convert and query vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for name, help_text, first in (
        ("train", "train a model as a config says (the same as train.py)", "CONFIG"),
        ("eval", "evaluate a run or a model in HuggingFace format (the same as eval.py)", "RUN_OR_HF_DIR"),
    ):
        program = commands.add_parser(name, help=help_text)
        program.add_argument("words", nargs=argparse.REMAINDER, metavar=f"{first} [--field.name value ...]")
        if name == "train":
            program.description = (
                "CONFIG is a Python file with get_config(), the config.json of a run, or one of: "
                f"{', '.join(config_names())}. `rave-jax train CONFIG --help` lists the fields."
            )
        else:
            program.description = "`rave-jax eval RUN_OR_HF_DIR --help` lists the fields."

    convert = commands.add_parser("convert", help="convert checkpoints between HuggingFace format and ours")
    ways = convert.add_subparsers(dest="way", required=True, metavar="from-hf|from-original|from-gguf|to-hf|join")
    from_hf = ways.add_parser("from-hf", help="make a native checkpoint of a HuggingFace directory")
    from_hf.add_argument("source", type=Path, help="directory with config.json and safetensors")
    from_hf.add_argument("--dtype", choices=DTYPES, help="number type of the parameters (default: as stored)")
    from_hf.add_argument("--base", type=Path, help="directory of a PEFT adapter's base model (default: what it names)")
    from_gguf = ways.add_parser("from-gguf", help="make a HuggingFace directory of a GGUF file, dequantized")
    from_gguf.add_argument("source", type=Path, help="a .gguf file")
    from_gguf.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    from_original = ways.add_parser(
        "from-original", help="make a HuggingFace directory of a checkpoint in the format of its authors"
    )
    from_original.add_argument("source", type=Path, help="directory of the checkpoint")
    from_original.add_argument("--tower", type=Path, help="HuggingFace directory of its vision tower")
    to_hf = ways.add_parser("to-hf", help="make a HuggingFace directory of a native checkpoint or a training run")
    to_hf.add_argument("source", type=Path, help="native checkpoint, run directory, or HuggingFace directory")
    to_hf.add_argument("--dtype", choices=DTYPES, help="number type of the weights (default: that of the parameters)")
    to_hf.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    to_hf.add_argument(
        "--weights",
        choices=("trained", "ema"),
        default="trained",
        help="of a run: of a step, or their moving average",
    )
    to_hf.add_argument(
        "--max-shard-size",
        type=_size,
        default=5 * 10**9,
        metavar="SIZE",
        help="of a weight file, as 5GB (default) or 500MB",
    )
    to_hf.add_argument(
        "--lora",
        choices=("merge", "peft", "beside"),
        default="merge",
        help="merged into the weights (default), as a PEFT adapter directory, or beside unchanged weights, which only "
        "rave_jax reads together",
    )
    to_hf.add_argument(
        "--base", type=Path, help="the model that a PEFT adapter is of (default: what the run began with)"
    )
    join = ways.add_parser("join", help="make a model with pictures of a vision tower and a text model")
    join.add_argument("tower", type=Path, help="HuggingFace directory of SigLIP or SigLIP2")
    join.add_argument("text", type=Path, help="HuggingFace directory of a text model")
    join.add_argument(
        "--seed", type=int, default=0, help="of the mlp between them, in which nothing is learned yet (default: 0)"
    )
    for way in (from_hf, from_original, from_gguf, to_hf, join):
        way.add_argument("destination", type=Path, help="directory to make; it must not exist or must be empty")

    inspect = commands.add_parser("inspect", help="print a model's config and parameters without loading it")
    inspect.add_argument(
        "path", type=Path, help="HuggingFace directory (config.json is enough), native checkpoint or run directory"
    )

    logits = commands.add_parser("logits", help="write the float32 logits of one conversation")
    logits.add_argument("model", type=Path, help="HuggingFace directory, native checkpoint or run directory")
    logits.add_argument("request", type=Path, help="JSON list of messages in HF chat format, images by path")
    logits.add_argument("out", type=Path, help=".npz to write: input_ids [T], logits [T,V]")
    logits.add_argument("--add-generation-prompt", action="store_true", help="end where an answer would begin")
    logits.add_argument(
        "--image-dir",
        type=Path,
        metavar="FOLDER",
        help="only pictures below this folder may be named (default: the folder of the request)",
    )
    _add_special_tokens(logits)

    generate = commands.add_parser("generate", help="answer a prompt, a file of requests, or a conversation")
    generate.add_argument("model", type=Path, help="HuggingFace directory, native checkpoint or run directory")
    generate.add_argument("--prompt", metavar="TEXT", help="the question; the answer goes to stdout as it is generated")
    generate.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="picture before the prompt; may be given several times",
    )
    generate.add_argument(
        "--video",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="video file before the prompt; may be given several times",
    )
    generate.add_argument("--system", metavar="TEXT", help="system message of every conversation")
    generate.add_argument(
        "--requests",
        type=Path,
        metavar="FILE",
        help="JSON Lines with 'messages' in HF chat format, images by path; - is stdin",
    )
    generate.add_argument(
        "--image-dir",
        type=Path,
        metavar="FOLDER",
        help="requests and /image may only name pictures below it "
        "(default: the folder of --requests, or the working directory)",
    )
    generate.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON Lines of answers to --requests (default: stdout)"
    )
    generate.add_argument("--interactive", action="store_true", help="have a conversation, one question per line")
    generate.add_argument(
        "--dtype", choices=DTYPES, help="number type to compute in (default: that of the model's options)"
    )
    _add_special_tokens(generate)
    generate.add_argument("--verbose", action="store_true", help="print the number of tokens and the speed on stderr")
    generate.late = _generation_flags

    calibrate = commands.add_parser("calibrate", help="find settings of a mechanism by running a model")
    kinds = calibrate.add_subparsers(
        dest="mechanism", required=True, metavar="zero-tuning|sads|vhr|rave|var|debias|dyvte"
    )
    for name, summary, late in (
        ("zero-tuning", "find heads and gamma of ZeroTuning", _calibration_flags),
        ("sads", "find the heads that SADS drops", _sads_flags),
        ("vhr", "find the heads that VHR multiplies", _vhr_flags),
        ("rave", "choose the heads that get a RAVE gate", _rave_flags),
        ("var", "find the sink dimensions that VAR reads", _var_flags),
        ("debias", "fit the bias for places that Pruning takes out", _debias_flags),
        ("dyvte", "train the routers of Dyvte; OUT is a new directory for the model with them", _dyvte_flags),
    ):
        search = kinds.add_parser(name, help=summary)
        _add_calibration(search)
        search.late = late

    look = commands.add_parser(
        "look", help="show where an answer comes from: its attention, and what hiding parts costs"
    )
    look.add_argument("model", type=Path, help="HuggingFace directory, native checkpoint or run directory")
    look.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    look.add_argument(
        "--image",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="picture before the prompt; may be given several times",
    )
    look.add_argument("--picture", type=_count, default=1, help="which of them the maps are of, from 1 (default: 1)")
    look.add_argument(
        "--box",
        type=float,
        nargs=4,
        metavar=("X1", "Y1", "X2", "Y2"),
        help="where the evidence is in that picture, in pixels; shares inside it are said",
    )
    look.add_argument("--html", type=Path, default=Path("look.html"), help="page to write (default: look.html)")
    look.add_argument(
        "--blocks", type=_count, default=64, help="parts of the picture that are hidden in turn, at most (default: 64)"
    )
    look.add_argument("--max-new-tokens", type=_count, default=32, help="most tokens of the answer (default: 32)")
    look.add_argument("--rows", type=_count, default=4, help="passes made at once (default: 4)")
    look.add_argument(
        "--dtype", choices=DTYPES, help="number type to compute in (default: that of the model's options)"
    )

    data = commands.add_parser(
        "data",
        help="print the tokens and patches that a config's data needs, and which samples cannot be used, or show rows",
    )
    data.add_argument("words", nargs=argparse.REMAINDER, metavar="CONFIG [--field.name value ...]")
    data.late = _data_flags

    plan = commands.add_parser(
        "plan", help="print what a config's step needs and moves on TPUs, from their own compiler; no TPU is needed"
    )
    plan.add_argument("words", nargs=argparse.REMAINDER, metavar="CONFIG [--field.name value ...]")
    plan.late = _plan_flags

    study = commands.add_parser(
        "study", help="run what is missing of a study, and say what its arms' differences decide"
    )
    study.description = (
        "CONFIG is a Python file whose get_config() returns a Study, or one of: "
        f"{', '.join(config_names(STUDIES))}. Several jobs may run one study at the same time (docs/studies.md)."
    )
    study.add_argument("config", metavar="CONFIG", help="file or name of the study")
    study.add_argument("--arm", action="append", default=[], metavar="NAME", help="run this arm; may be given again")
    study.add_argument("--seed", action="append", default=[], type=int, metavar="N", help="run this seed; the same")
    study.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the study (default: what it says)")
    study.add_argument("--report", action="store_true", help="run nothing; print and write the page")
    return parser


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    """What every search takes."""
    parser.add_argument("model", type=Path, help="HuggingFace directory, native checkpoint or run directory")
    parser.add_argument(
        "out", type=Path, help="JSON to write: a list for `mechanisms` of a model's options (dyvte: a new directory)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON Lines with question, answers and image (default: held-out synthetic pictures)",
    )
    parser.add_argument(
        "--samples", type=_count, default=200, help="number of samples, from the first on (default: 200)"
    )
    parser.add_argument("--rows", type=_count, default=16, help="samples run at once (default: 16)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="number type to compute in (default: that of the model's options)"
    )


def _add_special_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--special-tokens-in-text",
        choices=("text", "tokens"),
        help="how <|im_end|> and the like in a message are read: as text or as tokens "
        "(default: as in training, else text)",
    )


def _generation_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.generate import add_flags

    add_flags(parser)


def _calibration_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate import add_flags

    add_flags(parser)


def _sads_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_heads import add_sads_flags

    add_sads_flags(parser)


def _vhr_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_heads import add_vhr_flags

    add_vhr_flags(parser)


def _rave_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_heads import add_rave_flags

    add_rave_flags(parser)


def _var_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_heads import add_var_flags

    add_var_flags(parser)


def _debias_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_tokens import add_debias_flags

    add_debias_flags(parser)


def _dyvte_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.calibrate_tokens import add_dyvte_flags

    add_dyvte_flags(parser)


def _data_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.data import add_flags

    add_flags(parser)


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    from rave_jax.tools.plan import add_flags

    add_flags(parser)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count, expected a number of at least 1")
    return int(text)


def _size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units.get(text[-2:].upper())) if text[-2:].isalpha() else (text, 1)
    if unit is None or not number.strip().isdecimal() or int(number) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, expected one such as 5GB or 500MB")
    return int(number) * unit


def _store_error() -> type[Exception]:
    """The error of a run's checkpoints. It brings jax in, so it is imported when something else is raised."""
    from rave_jax.checkpoint.store import StoreError

    return StoreError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0, 2 for input that cannot be used, said in one message, or 1 where a part of it could not be used.
    """
    arguments = _parser().parse_args(argv)
    plain_messages()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal cannot show ends no conversation and no file of requests.
        sys.stdout.reconfigure(errors="backslashreplace")
    # Only tokenizers are used of transformers; its remark that torch is missing would confuse.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        for name, value in vars(arguments).items():
            if isinstance(value, Path):
                local_path(value, name)
        return _run(arguments)
    except ConfigError as error:
        print(f"rave-jax: {error}", file=sys.stderr)
        return EXIT_INPUT
    except _store_error() as error:
        print(f"rave-jax: {error}", file=sys.stderr)
        return EXIT_INPUT
    except BrokenPipeError:  # `| head` has seen enough; the interpreter must not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "train":
            from rave_jax.tools.train import main as train

            return train(arguments.words, "rave-jax train")
        case "eval":
            from rave_jax.tools.eval import main as evaluate

            return evaluate(arguments.words, "rave-jax eval")
        case "convert":
            from rave_jax.tools.convert import HfForm, from_gguf, from_hf, from_original, join, to_hf

            if arguments.way == "join":
                join(arguments.tower, arguments.text, arguments.destination, arguments.seed)
            elif arguments.way == "from-gguf":
                from_gguf(arguments.source, arguments.destination, arguments.dtype)
            elif arguments.way == "from-hf":
                from_hf(arguments.source, arguments.destination, arguments.dtype, arguments.base)
            elif arguments.way == "from-original":
                from_original(arguments.source, arguments.destination, arguments.tower)
            else:
                form = HfForm(arguments.dtype, arguments.max_shard_size, arguments.lora, arguments.base)
                to_hf(arguments.source, arguments.destination, form, arguments.step, arguments.weights)
        case "inspect":
            from rave_jax.tools.inspect import inspect

            inspect(arguments.path)
        case "logits":
            from rave_jax.tools.logits import write_logits

            write_logits(
                arguments.model,
                arguments.request,
                arguments.out,
                arguments.add_generation_prompt,
                arguments.image_dir,
                arguments.special_tokens_in_text,
            )
        case "generate":
            from rave_jax.tools.generate import generate

            return generate(arguments)
        case "calibrate":
            from rave_jax.tools import calibrate, calibrate_heads, calibrate_tokens

            searches = {
                "zero-tuning": calibrate.calibrate,
                "sads": calibrate_heads.calibrate_sads,
                "vhr": calibrate_heads.calibrate_vhr,
                "rave": calibrate_heads.calibrate_rave,
                "var": calibrate_heads.calibrate_var,
                "debias": calibrate_tokens.calibrate_debias,
                "dyvte": calibrate_tokens.calibrate_dyvte,
            }
            searches[arguments.mechanism](arguments)
        case "look":
            from rave_jax.tools.look import look

            look(arguments)
        case "study":
            from rave_jax.tools.study import study_command

            return study_command(arguments)
        case "plan":
            from rave_jax.tools.plan import plan

            return plan(arguments)
        case "data":
            from rave_jax.tools.data import look_at_data

            return look_at_data(arguments)
    return 0


def program() -> NoReturn:
    """Run the command line of this process, and end it with the exit code."""
    code = main()
    if sys.argv[1:2] in (["train"], ["eval"], ["study"]):
        from rave_jax.parallel.stopping import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
